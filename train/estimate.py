"""What a run will need, from shapes alone: memory by part, arithmetic, and time."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train.options import Options
from train.presets import Config

EXPECTED_SHARE = 0.35
"""Of the device's peak: what a run is expected to reach, for the first guess at its time."""

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}
"""Dense 16-bit FLOP/s by a part of the device's name, as the makers state them."""


class Estimate(NamedTuple):
    """Of one run.

    Attributes:
      parameters: all of them, and `trained` those with a gradient.
      parts: bytes by name, over all devices.
      flops: of one step, forward and backward; recomputation (remat) does not count.
      tokens: of one step.
      checkpoint: bytes of one checkpoint: what is trained, and the optimizer's state.
    """

    parameters: int
    trained: int
    parts: dict[str, int]
    flops: float
    tokens: int
    checkpoint: int

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def estimate(
    config: Config,
    options: Options,
    params: Any,
    frozen: Any,
    opt_state: Any,
    platform: str | None = None,
) -> Estimate:
    """From the shapes of the trees; nothing is allocated.

    ``params``, ``frozen`` and ``opt_state`` are trees of arrays or of `jax.ShapeDtypeStruct`;
    `platform` is "cpu", "gpu" or "tpu", by default the one that JAX runs on here.

    >>> from pathlib import Path
    >>> from train.presets import PRESETS
    >>> weight = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    >>> options = Options("tiny", Path("x"), batch_size=2, length=64)
    >>> found = estimate(PRESETS["tiny"], options, weight, None, (weight, weight))
    >>> found.parts["parameters"], found.parts["optimizer state"]
    (4000000, 8000000)
    """
    tokens = options.batch_size * options.length
    parts = {
        "parameters": _bytes(params) + _bytes(frozen),
        "gradients": _bytes(params) * (2 if options.microbatches > 1 else 1),
        "optimizer state": _bytes(opt_state),
        "activations": _activations(config, options, platform or jax.default_backend()),
        "logits": _logits(config, options),
    }
    return Estimate(
        parameters=_count(params) + _count(frozen),
        trained=_count(params),
        parts=parts,
        flops=tokens * flops_per_token(config, options.length, trains_all=_count(frozen) == 0),
        tokens=tokens,
        checkpoint=_bytes((params, opt_state)),
    )


def flops_per_token(config: Config, length: int, *, trains_all: bool) -> float:
    """2 a weight of every product forward; backward as much for inputs, and again for weights.

    Of a mixture the experts that a token is sent to count. A frozen weight has no gradient of its
    own; adapters are small enough to be left out. Attention counts 4 a pair of positions and
    channel forward, twice that backward, all pairs.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.active_width)
    if config.experts is not None:
        layer += config.hidden_size * config.experts.num_experts  # the router
    weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    attention = config.num_hidden_layers * 4 * length * queries
    return (6 if trains_all else 4) * weights + 3 * attention


def check(found: Estimate, available: int | None, devices: int) -> None:
    """Say at once that a run cannot fit.

    Raises:
      ValueError: with the need by part and what to change.
    """
    if available is not None and found.bytes / devices > available:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.parts.items())
        raise ValueError(
            f"this run needs about {found.bytes / devices / 1e9:.1f} GB a device ({parts} GB over "
            f"{devices}), and there are {available / 1e9:.1f} GB: take more --microbatches, "
            "--remat, a --loss-chunk, --param-dtype bfloat16, a smaller model, or more devices"
        )


def describe(found: Estimate, options: Options, peak: float, devices: int) -> str:
    """The estimate as two lines for a person, its evaluations as far as the options bound them."""
    steps, rate = options.steps, peak * devices * EXPECTED_SHARE
    evaluations = _evaluated(options) * found.flops / found.tokens * forward_share(found) / rate
    whole = "" if options.final_eval_targets else ", and at the end all held-out text"
    seconds = steps * found.flops / rate
    parts = ", ".join(f"{name} {_size(size)}" for name, size in found.parts.items())
    return (
        f"{_short(found.parameters)} parameters, {_short(found.trained)} of them trained; "
        f"about {_size(found.bytes / devices)} a device ({parts})\n"
        f"{steps} steps of {found.tokens} tokens, {steps * found.flops:.2g} FLOP; a guess, until "
        f"the first steps are timed: {_duration(seconds)} and {_duration(evaluations)} of "
        f"evaluations{whole}, at {EXPECTED_SHARE:.0%} of {peak / 1e12:.3g} TFLOP/s"
    )


def _evaluated(options: Options) -> int:
    """Tokens of the evaluations whose length the options say; of the last one it is two splits."""
    times = (options.steps - 1) // options.eval_every if options.eval_every else 0
    return times * options.eval_targets + 2 * (options.final_eval_targets or 0)


def forward_share(found: Estimate) -> float:
    """Of a step: a third where all parameters are trained, half where adapters are."""
    return 1 / 3 if found.trained == found.parameters else 1 / 2


class TimeLeft(NamedTuple):
    """How long a run will take, from the speed of its first steps on this machine.

    A forward pass is a third of a step that trains all parameters, and half of one that trains
    adapters; so much an evaluation takes for each of its tokens.

    Attributes:
      options: of the run.
      cost: of one step.
      evaluated: tokens that the whole run predicts in its evaluations.
    """

    options: Options
    cost: Estimate
    evaluated: int

    def seconds(self, step: int, tokens_per_second: float) -> tuple[float, float]:
        """For the steps after `step`, and for the evaluations that come with them."""
        left = self.options.steps - step
        evaluation = forward_share(self.cost) * self.evaluated / tokens_per_second
        return left * self.cost.tokens / tokens_per_second, evaluation

    def describe(self, step: int, tokens_per_second: float) -> str:
        """The same as a line for a person."""
        steps, evaluations = self.seconds(step, tokens_per_second)
        return (
            f"measured over the last steps: the {self.options.steps - step} steps that are left "
            f"take about {_duration(steps)}, the evaluations {_duration(evaluations)}"
        )


def available_bytes(device: jax.Device) -> int | None:
    """Memory of a device, of a CPU that of the machine; None where nobody says."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


@functools.cache
def peak_flops(device: jax.Device) -> float:
    """FLOP/s of `PEAKS`; of a device that is not in it, what one large product reaches."""
    for name, peak in PEAKS.items():
        if name.lower() in device.device_kind.lower():
            return peak
    return _measured_peak(device)


def _measured_peak(device: jax.Device, size: int = 1024, times: int = 5) -> float:
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)

    def seconds() -> float:
        began = time.perf_counter()
        product(x, x).block_until_ready()
        return time.perf_counter() - began

    seconds()
    return 2 * size**3 / min(seconds() for _ in range(times))


def _activations(config: Config, options: Options, platform: str) -> int:
    """What the backward pass keeps of one microbatch, without remat or with it."""
    rows = options.batch_size * options.length // options.microbatches
    width = jnp.dtype(options.dtype).itemsize
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = width * (4 * config.hidden_size + 2 * queries + 2 * keys + 3 * config.active_width)
    if platform != "gpu" or width != 2:  # no fused attention: its weights are kept
        layer += 8 * config.num_attention_heads * options.length
    if options.remat:
        return rows * (config.num_hidden_layers * width * config.hidden_size + layer)
    return rows * config.num_hidden_layers * layer


def _logits(config: Config, options: Options) -> int:
    """Float32 logits and their gradient, of all positions or of a chunk of each sequence."""
    sequences = options.batch_size // options.microbatches
    positions = min(options.loss_chunk or options.length, options.length)
    return 2 * 4 * sequences * positions * config.vocab_size


def _sum(measure: Callable[[Any], int], tree: Any) -> int:
    return sum(measure(leaf) for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return _sum(lambda leaf: leaf.size, tree)


def _bytes(tree: Any) -> int:
    return _sum(lambda leaf: leaf.size * leaf.dtype.itemsize, tree)


def _short(count: int) -> str:
    """Billions or millions, in three digits.

    >>> _short(7_615_616_512), _short(663_424), _short(300)
    ('7.62 B', '0.663 M', '0.0003 M')
    """
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 180 else f"{seconds:.0f} s"

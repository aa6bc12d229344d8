"""The loops whose speed is compared, and how they take turns."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from train import data, estimate, model, packing, run
from train.options import Options
from train.watch import Watch


class Shape(NamedTuple):
    """What a step computes: model, sequences a step, tokens a sequence."""

    config: model.Config
    batch_size: int
    length: int


SIZES = {
    "small": Shape(model.Config(2048, 256, 768, 6, 4, 2, 64), 16, 128),
    "0.5b": Shape(model.PRESETS["Qwen/Qwen2.5-0.5B"], 8, 1024),
    "1.5b": Shape(model.PRESETS["Qwen/Qwen2.5-1.5B"], 8, 1024),
}
"""The large ones are for a GPU, with random weights."""

Stretch = Callable[[], float]
"""Runs so many steps to the end, and gives their seconds."""


def options_of(shape: Shape, out: Path, steps: int) -> Options:
    """What our loop is given; a large model is scanned, and its loss computed in chunks."""
    on_gpu, large = jax.default_backend() == "gpu", shape.config.num_hidden_layers > 6
    return Options(
        model="in memory",
        out=out,
        steps=steps,
        batch_size=shape.batch_size,
        length=shape.length,
        schedule="constant",
        warmup=0.0,
        dtype="bfloat16" if on_gpu else "float32",
        scan=large,
        loss_chunk=128 if large else None,
    )


def decoder(shape: Shape, options: Options) -> model.Decoder:
    return model.Decoder(shape.config, rngs=nnx.Rngs(0), **run.kinds(options))


def batches(config: model.Config, options: Options) -> Callable[[int], np.ndarray]:
    """The batch of a step: the same for all loops."""
    tokens = _corpus(config).train
    sizes = {"batch_size": options.batch_size, "length": options.length}
    return lambda step: data.sample(tokens, 0, step, **sizes)


def plain(
    decoder: model.Decoder,
    trained: Any,
    options: Options,
    tx: optax.GradientTransformation,
    steps: int,
) -> Stretch:
    """What one writes by hand: a jitted step that donates, batches from NumPy, nothing else."""
    graphdef, params, frozen = model.split(decoder, trained)
    loss_fn = model.next_token_loss(graphdef, chunk=options.loss_chunk, z_loss=options.z_loss)
    batch, tx = batches(decoder.config, options), optax.with_extra_args_support(tx)

    def step(params: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(lambda leaf: leaf.copy(), params)
    carry = [params, tx.init(params), 0]

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            carry[:] = *compiled(carry[0], carry[1], frozen, batch(carry[2])), carry[2] + 1
        jax.block_until_ready(carry[0])
        return time.perf_counter() - began

    return stretch


def ours(
    decoder: model.Decoder,
    trained: Any,
    options: Options,
    steps: int,
    opened: contextlib.ExitStack,
) -> Stretch:
    """The loop of `train.run`, as the scripts have it, a stretch at a time."""
    cost = estimate.estimate(decoder.config, options, nnx.state(decoder, nnx.Param), None, None)
    task = run.task(_copy(decoder), trained, _corpus(decoder.config), options, cost)
    options.out.mkdir(parents=True, exist_ok=True)
    rollback = opened.enter_context(run.checkpoints(options))
    watch = opened.enter_context(Watch(options, task.cost))
    batch = opened.enter_context(packing.Prefetch(task.batch))
    walk = run.steps(task, options, rollback, watch, batch, jax.jit(task.tx.init)(task.params))
    next(walk)

    def stretch() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            _, state = next(walk)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    return stretch


def measured(
    stretches: dict[str, Stretch], shape: Shape, steps: int, rounds: int, *, trains_all: bool
) -> dict[str, Any]:
    """Each loop once to warm up, then `rounds` turns of each; the order turns with every round."""
    seconds: dict[str, list[float]] = {name: [] for name in stretches}
    for stretch in stretches.values():
        stretch()
    for i in range(rounds):
        order = list(stretches) if i % 2 == 0 else list(stretches)[::-1]
        for name in order:
            seconds[name].append(stretches[name]())
    tokens = steps * shape.batch_size * shape.length
    flops = estimate.flops_per_token(shape.config, shape.length, trains_all=trains_all)
    peak = estimate.peak_flops(jax.devices()[0])
    medians = {name: tokens / float(np.median(s)) for name, s in seconds.items()}
    ratios = {name: (np.array(s) / np.array(seconds["ours"])) for name, s in seconds.items()}
    return {
        "tokens_per_second": medians,
        "mfu": {name: rate * flops / peak for name, rate in medians.items()},
        "ours_over": {
            name: [float(q) for q in np.quantile(ratio, [0.25, 0.5, 0.75])]
            for name, ratio in ratios.items()
            if name != "ours"
        },
        "seconds": seconds,
    }


def _corpus(config: model.Config) -> data.Corpus:
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=10**6).astype(np.int32)
    return data.Corpus(tokens, tokens[:2000], tokens[:2000], tokenizer=None)  # type: ignore[arg-type]


def _copy(decoder: model.Decoder) -> model.Decoder:
    graphdef, state = nnx.split(decoder)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.copy(), state))

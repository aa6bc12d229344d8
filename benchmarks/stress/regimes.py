"""The four regimes of the stress benchmark, and `run_cell`: one training run in one of them.

To try any optimizer (a variant of the law, say) on the benchmark's regimes from a scratch script::

    from benchmarks.stress.bench import prepare
    from benchmarks.stress.regimes import REGIMES, SIZES, run_cell

    bench = prepare("wikitext-2", SIZES["default"])    # None: the embedded corpus
    factory = lambda recipe: lbw_guard(optax.adamw(recipe.learning_rate, b2=recipe.b2))
    cell = run_cell(bench, REGIMES["lora"], factory, lr=0.1, seed=0)
    cell["perplexity"]["valid"], cell["valid_curve"], cell["metrics"]["scale"]

A factory takes a `Recipe` and returns an optimizer; those of the benchmark are in
`benchmarks.stress.methods`. One factory object is compiled once a regime, for the learning rate and
the seed are arguments of the compiled run: sweep them with the factory kept. A run uses one core,
so two threads or processes run two cells at a time. ``keep=("overshoot",)`` names further guard
metrics to return step by step.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbw_optax
from benchmarks.stress.bench import Bench, Size, start
from train import data, loop, model

LONGER = 5
"""How many times as long the size `long` trains as the default."""
CHECKPOINTS = 25
"""Points of the two loss curves; the last one is the end of the run."""


class Regime(NamedTuple):
    """A training situation: what is trained, from where, and with which recipe."""

    name: str
    title: str
    from_base: bool
    adapters: bool
    b2: float
    weight_decay: float
    clip: float | None
    warmup_cosine: bool
    multiples: tuple[int, ...]  # of the tuned learning rate
    guess: float  # where the search for the tuned learning rate starts


class Recipe(NamedTuple):
    """What a method is given: the regime's schedule and constants."""

    peak: jax.Array
    learning_rate: optax.Schedule
    undecayed: optax.Schedule  # the same without the cosine
    shape: optax.Schedule  # the same with a peak of 1, for methods without a learning rate
    b1: float
    b2: float
    weight_decay: float
    clip: float | None
    steps: int
    optimizer: str = "AdamW"  # another only in `benchmarks.atlas`


Factory = Callable[[Recipe], optax.GradientTransformation]

TO_300, TO_30 = (1, 3, 10, 30, 100, 300), (1, 3, 10, 30)

REGIMES = {
    regime.name: regime
    for regime in (
        Regime("lora", "LoRA", True, True, 0.999, 1e-4, None, False, TO_300, 2e-3),
        Regime("full", "full fine-tuning", True, False, 0.999, 1e-4, None, False, TO_300, 1e-3),
        Regime("scratch", "from scratch", False, False, 0.999, 1e-4, None, False, TO_30, 2e-3),
        Regime("recipe", "warm-up + cosine", False, False, 0.95, 0.1, 1.0, True, TO_30, 5e-3),
    )
}


def _decoder(vocab: int, hidden: int, layers: int) -> model.Config:
    return model.Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
    )


SIZES = {
    size.name: size
    for size in (
        Size(
            name="default",
            config=_decoder(vocab=1024, hidden=96, layers=3),
            length=64,
            batch_size=8,
            base_steps=2500,
            steps={"lora": 150, "full": 150, "scratch": 300, "recipe": 400},
            evaluated=32_768,
            curve_windows=32,
            rank=8,
        ),
        Size(
            name="quick",
            config=_decoder(vocab=512, hidden=64, layers=2),
            length=64,
            batch_size=8,
            base_steps=600,
            steps={"lora": 75, "full": 75, "scratch": 150, "recipe": 200},
            evaluated=16_384,
            curve_windows=16,
            rank=8,
        ),
    )
}
_STEPS = {name: LONGER * steps for name, steps in SIZES["default"].steps.items()}
SIZES["long"] = SIZES["default"]._replace(name="long", steps=_STEPS)


def run_cell(
    bench: Bench,
    regime: Regime,
    factory: Factory,
    lr: float,
    seed: int,
    *,
    keep: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train once and evaluate: perplexities, loss curves, and the guard's metrics step by step."""
    began = time.perf_counter()
    steps, loss_fn = bench.size.steps[regime.name], bench.losses[regime.adapters]
    params, frozen = start(bench, seed, from_base=regime.from_base, adapters=regime.adapters)
    run = _compiled(loss_fn, regime, factory, steps, keep)
    drawn = batches(bench, regime, seed, steps)
    result = jax.device_get(run(jnp.float32(lr), params, frozen, drawn, bench.curve))
    return {
        "perplexity": _perplexity(bench, loss_fn, result["params"], frozen),
        "train_curve": result["losses"].mean(1).tolist(),
        "valid_curve": result["curve"].tolist(),
        "metrics": {name: values.ravel().tolist() for name, values in result["metrics"].items()},
        "seconds": time.perf_counter() - began,
    }


def perplexity_before(bench: Bench, regime: Regime, seed: int) -> dict[str, float]:
    """Perplexity of both held-out splits before the first step."""
    params, frozen = start(bench, seed, from_base=regime.from_base, adapters=regime.adapters)
    return _perplexity(bench, bench.losses[regime.adapters], params, frozen)


def _perplexity(bench: Bench, loss_fn: loop.LossFn, params: Any, frozen: Any) -> dict[str, float]:
    return {
        split: loop.perplexity(loss_fn, params, windows, frozen=frozen)
        for split, windows in bench.held_out.items()
    }


@functools.lru_cache(maxsize=8)  # a whole grid of programs would fill the memory
def _compiled(
    loss_fn: loop.LossFn, regime: Regime, factory: Factory, steps: int, keep: tuple[str, ...]
) -> Callable[..., dict[str, Any]]:
    """One program for a whole run: a loop over steps on the host takes twice the time."""

    def run(lr: jax.Array, params: Any, frozen: Any, batches: Any, curve: Any) -> dict[str, Any]:
        tx = optax.with_extra_args_support(factory(recipe(regime, lr, steps)))

        def step(carry: Any, tokens: jax.Array) -> tuple[Any, Any]:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, frozen, tokens)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), (loss, watch(state, keep))

        def stretch(carry: Any, tokens: jax.Array) -> tuple[Any, Any]:
            carry, (losses, metrics) = jax.lax.scan(step, carry, tokens)
            return carry, (losses, metrics, loss_fn(averaged(*carry), frozen, curve))

        carry, (losses, metrics, valid) = jax.lax.scan(stretch, (params, tx.init(params)), batches)
        return {"params": averaged(*carry), "losses": losses, "curve": valid, "metrics": metrics}

    return jax.jit(run)


def watch(state: Any, keep: tuple[str, ...]) -> dict[str, jax.Array]:
    """Of a guard's metrics those that a benchmark follows; nothing where no guard is."""
    try:
        metrics = lbw_optax.metrics(state)
    except ValueError:  # no guard in this state
        return {}
    return {name: metrics[name] for name in ("scale", "events", "skips", *keep)}


def averaged(params: Any, state: Any) -> Any:
    """The parameters to evaluate: of a schedule-free optimizer its average, else as they are."""
    kind = optax.contrib.ScheduleFreeState
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    return optax.contrib.schedule_free_eval_params(found[0], params) if found else params


def batches(bench: Bench, regime: Regime, seed: int, steps: int) -> np.ndarray:
    """All batches of a run, of shape (CHECKPOINTS, steps between, batch_size, length + 1)."""
    tokens, size = bench.tokens["finetune" if regime.from_base else "scratch"], bench.size
    drawn = [
        data.sample(tokens, seed, step, batch_size=size.batch_size, length=size.length)
        for step in range(steps)
    ]
    return np.stack(drawn).reshape(CHECKPOINTS, -1, size.batch_size, size.length + 1)


def recipe(regime: Regime, peak: jax.Array, steps: int) -> Recipe:
    constant = optax.constant_schedule(1.0)
    shape = _warmup_cosine(steps) if regime.warmup_cosine else constant
    return Recipe(
        peak=peak,
        learning_rate=lambda count: peak * shape(count),
        undecayed=ramp(peak, steps) if regime.warmup_cosine else lambda count: peak,
        shape=shape,
        b1=0.9,
        b2=regime.b2,
        weight_decay=regime.weight_decay,
        clip=regime.clip,
        steps=steps,
    )


def ramp(peak: jax.Array, steps: int) -> optax.Schedule:
    """A tenth of the run linearly up to the peak, then constant; it starts above zero."""
    return lambda count: peak * jnp.minimum(1.0, (count + 1) / (steps // 10))


def _warmup_cosine(steps: int) -> optax.Schedule:
    """A tenth of the run up, a cosine down to zero; it starts above zero (Prodigy needs that)."""
    warmup = steps // 10
    return optax.warmup_cosine_decay_schedule(1 / warmup, 1.0, warmup, steps)

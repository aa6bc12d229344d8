"""The skip rules of two training frameworks, holes included: a NaN enters their statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import history
from benchmarks.peers.norms import global_norm
from benchmarks.peers.skip_step import SkipStepState


def maxtext_skip(
    inner: optax.GradientTransformation, window: int = 128, sigmas: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    """Skips a step whose loss or gradient norm exceeds mean + sigmas · std of the `window` before.

    The deviation is that of a sample. Nothing is skipped until all but one of half the window are
    known, so that a NaN passes; later one NaN makes mean and deviation NaN, and every step is
    skipped until it has left the window. `update` needs the loss as `value`.

    Rule and constants: github.com/AI-Hypercomputer/maxtext, src/maxtext/optimizers/optimizers.py,
    `skip_step_on_spikes`, which follows OLMo-core.
    """

    def decide(past: history.History, x: jax.Array) -> jax.Array:
        mean, deviation = _mean_and_deviation(past, lost=1)
        early = past.seen + 1 < max(2, window // 2)
        return early | (x - mean <= sigmas * deviation)

    return _skipping(inner, window, decide, lambda fine, u: jnp.where(fine, u, jnp.zeros_like(u)))


def levanter_skip(
    inner: optax.GradientTransformation, window: int = 128, sigmas: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    """The same with the deviation of a population, at least 1e-6, and from half the window on.

    A skipped update is multiplied by zero: a NaN in it stays NaN. `update` needs the loss as
    `value`.

    Rule and constants: github.com/marin-community/marin, lib/levanter/src/levanter/optim/
    skipstep.py. An older version, which leaves NaN out of its statistics, is `skip_step`.
    """

    def decide(past: history.History, x: jax.Array) -> jax.Array:
        mean, deviation = _mean_and_deviation(past, lost=0)
        early = past.seen < max(2, window // 2)
        return early | (x <= mean + sigmas * jnp.maximum(deviation, 1e-6))

    return _skipping(inner, window, decide, lambda fine, u: u * fine.astype(u.dtype))


def _skipping(
    inner: optax.GradientTransformation, window: int, decide: Any, keep: Any
) -> optax.GradientTransformationExtraArgs:
    """Updates the inner optimizer where both loss and norm are fine; every step is remembered."""
    inner_with_args = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> SkipStepState:
        return SkipStepState(inner.init(params), history.empty(window), history.empty(window))

    def update_fn(
        updates: optax.Updates,
        state: SkipStepState,
        params: optax.Params | None = None,
        *,
        value: jax.Array,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipStepState]:
        norm = global_norm(updates)
        fine = decide(state.losses, value) & decide(state.norms, norm)
        steps, moved = inner_with_args.update(
            updates, state.inner, params, value=value, **extra_args
        )
        steps = jax.tree.map(lambda u: keep(fine, u), steps)
        inner_state = optax.tree.where(fine, moved, state.inner)
        losses, norms = history.push(state.losses, value), history.push(state.norms, norm)
        return steps, SkipStepState(inner_state, losses, norms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_and_deviation(past: history.History, lost: int) -> tuple[jax.Array, jax.Array]:
    known = jnp.arange(past.values.size) < past.seen
    mean = jnp.mean(past.values, where=known)
    return mean, jnp.std(past.values, where=known, ddof=lost)

"""Skip-step: leave out a step whose loss or gradient norm is far above its recent past."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import history
from benchmarks.peers.norms import global_norm


class SkipStepState(NamedTuple):
    inner: optax.OptState
    losses: history.History
    norms: history.History


def skip_step(
    inner: optax.GradientTransformation, window: int = 128, sigmas: float = 6.0
) -> optax.GradientTransformationExtraArgs:
    """Skips a step when its loss or its gradient norm exceeds mean + sigmas · std.

    Mean and standard deviation are over the `window` steps before; nothing is skipped until half
    of them are known. A skipped step leaves parameters and inner state untouched, and its loss and
    norm enter the history all the same. `update` needs the loss as `value`.

    Rule and constants: github.com/allenai/OLMo-core, optim/skip_step_optimizer.py, and
    github.com/stanford-crfm/levanter, optim/skipstep.py. They differ: OLMo-core also skips a loss
    that is far too low, and divides by the sample deviation; Levanter, followed here, is one-sided
    and uses the population deviation, at least 1e-6, over a ring of window + 1 (here: window).
    The rules of MaxText and of today's Levanter, which let a NaN in, are in `skip_spikes`.
    """
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
        fine = value <= history.limit(state.losses, sigmas)
        fine &= norm <= history.limit(state.norms, sigmas)
        fine |= state.losses.seen < max(2, window // 2)
        steps, inner_state = jax.lax.cond(
            fine,
            lambda: inner_with_args.update(updates, state.inner, params, value=value, **extra_args),
            lambda: (jax.tree.map(jnp.zeros_like, updates), state.inner),
        )
        losses, norms = history.push(state.losses, value), history.push(state.norms, norm)
        return steps, SkipStepState(inner_state, losses, norms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

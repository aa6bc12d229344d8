"""ZClip: clip the gradient norm when it is an outlier of its own running distribution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.norms import global_norm


class ZClipState(NamedTuple):
    step: jax.Array
    warmup_norms: jax.Array  # shape (warmup_steps,)
    mean: jax.Array
    variance: jax.Array


def zclip(
    alpha: float = 0.97,
    threshold: float = 2.5,
    max_norm: float = 1.0,
    warmup_steps: int = 25,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """Clips a gradient whose norm n has a z-score above the threshold.

    With running mean μ and variance σ² of the norm::

        z = (n − μ) / (σ + eps)
        c = μ + threshold·σ / (z / threshold)   if z > threshold, else n
        g ← g · min(c, max_norm) / (n + eps)    if that is below n
        μ ← α·μ + (1 − α)·c,   σ² ← α·σ² + (1 − α)·(c − μ)²      (with the new μ)

    For the first `warmup_steps` only `max_norm` clips; their raw norms give the first μ and σ².
    The more extreme the outlier, the lower it is clipped ("adaptive scaling").

    Kumar et al., "ZClip", arXiv:2504.02507; formula and constants from the authors' code,
    github.com/bluorion-com/ZClip, zclip/zclip.py. The paper's text was not at hand. As in that
    code the statistics take c without the cap at `max_norm`, and a NaN norm stays in them.
    """

    def init_fn(params: optax.Params) -> ZClipState:
        del params
        zero = jnp.zeros(())
        return ZClipState(jnp.zeros((), jnp.int32), jnp.zeros(warmup_steps), zero, zero)

    def update_fn(
        updates: optax.Updates, state: ZClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ZClipState]:
        del params
        norm = global_norm(updates)
        warming = state.step < warmup_steps
        target = jnp.where(warming, norm, _target(norm, state, threshold, eps))
        limit = jnp.minimum(target, max_norm)
        factor = jnp.where(norm > limit, limit / (norm + eps), 1.0)
        updates = jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)
        return updates, _learn(state, norm, target, alpha)

    return optax.GradientTransformation(init_fn, update_fn)


def _target(norm: jax.Array, state: ZClipState, threshold: float, eps: float) -> jax.Array:
    deviation = jnp.sqrt(state.variance)
    z = (norm - state.mean) / (deviation + eps)
    return jnp.where(z > threshold, state.mean + threshold * deviation / (z / threshold), norm)


def _learn(state: ZClipState, norm: jax.Array, target: jax.Array, alpha: float) -> ZClipState:
    length = state.warmup_norms.size
    warmup_norms = jnp.where(jnp.arange(length) == state.step, norm, state.warmup_norms)
    mean = alpha * state.mean + (1 - alpha) * target
    variance = alpha * state.variance + (1 - alpha) * (target - mean) ** 2
    warming = state.step < length
    return ZClipState(
        optax.safe_increment(state.step),
        warmup_norms,
        jnp.where(warming, warmup_norms.mean(), mean),
        jnp.where(warming, warmup_norms.var(), variance),
    )

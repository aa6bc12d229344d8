"""AdaGC: clip each tensor's gradient against a running mean of its own clipped norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.norms import global_norm, norm


class AdaGCState(NamedTuple):
    step: jax.Array
    norms: optax.Params  # one running norm per tensor


def adagc(
    ratio: float = 1.04,
    decay: float = 0.99,
    max_norm: float = 1.0,
    warmup_steps: int = 100,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """Per-tensor adaptive clipping: for each tensor with gradient g and running norm γ::

        ĝ = g · min(1, ratio·γ / (‖g‖ + eps))
        γ ← decay·γ + (1 − decay)·min(‖g‖, ratio·γ)

    For the first `warmup_steps` the whole gradient is clipped at the global norm `max_norm`
    instead, and γ is the smallest clipped norm so far.

    Wang et al., "AdaGC", arXiv:2502.11034 (abstract read); formula and constants from the
    authors' Megatron patch, github.com/lishuai-97/AdaGC, megatron-gpt2.patch. Settled here: a norm
    of exactly zero does not enter the minimum. LoRA's first factors start with a zero gradient,
    and the rule to the letter would freeze them for ever.
    """

    def init_fn(params: optax.Params) -> AdaGCState:
        norms = jax.tree.map(lambda _: jnp.asarray(jnp.inf, jnp.float32), params)
        return AdaGCState(jnp.zeros((), jnp.int32), norms)

    def update_fn(
        updates: optax.Updates, state: AdaGCState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaGCState]:
        del params
        warming = state.step < warmup_steps
        shared = jnp.minimum(1.0, max_norm / (global_norm(updates) + eps))

        def factor(g: jax.Array, gamma: jax.Array) -> jax.Array:
            size = norm(g)
            own = jnp.where(size > ratio * gamma, ratio * gamma / (size + eps), 1.0)
            return jnp.where(warming, shared, own)

        def learn(g: jax.Array, gamma: jax.Array) -> jax.Array:
            size = norm(g)
            lowest = jnp.where(size > 0, jnp.minimum(gamma, shared * size), gamma)
            mean = decay * gamma + (1 - decay) * jnp.minimum(size, ratio * gamma)
            return jnp.where(warming, lowest, mean)

        clipped = jax.tree.map(lambda g, n: g * factor(g, n).astype(g.dtype), updates, state.norms)
        norms = jax.tree.map(learn, updates, state.norms)
        return clipped, AdaGCState(optax.safe_increment(state.step), norms)

    return optax.GradientTransformation(init_fn, update_fn)

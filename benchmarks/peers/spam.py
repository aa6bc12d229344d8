"""SPAM: Adam with spike-aware clipping and a periodic reset of its moments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class SpamState(NamedTuple):
    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_spam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    threshold: float = 5000.0,
    reset_every: int = 500,
    warmup_steps: int = 150,
    grace_steps: int = 20,
) -> optax.GradientTransformation:
    """Spike-aware Adam with momentum reset; to be followed by weight decay and learning rate.

    At step t = 1, 2, …, per coordinate::

        m, v ← 0                            if t is a multiple of reset_every
        g ← sign(g)·√(threshold·v)          if g² > threshold·v and t mod reset_every ≥ grace_steps
        m ← b1·m + (1 − b1)·g,   v ← b2·v + (1 − b2)·g²
        u = s_t · √(1 − b2ᵗ) / (1 − b1ᵗ) · m / (√v + eps)

    k steps after a reset s_t = 1 − 0.99·(1 + cos(πk / (warmup_steps + 1)))/2 for k < warmup_steps;
    otherwise, and before the first reset, s_t = 1.

    Huang et al., "SPAM", arXiv:2501.06842 (abstract read). The official repository was not at
    hand; formula and constants are those of its pre-release copy, github.com/ffuhu/SPAM-tests,
    galore_torch/SPAM.py, at density 1; github.com/kozistr/pytorch_optimizer, optimizer/spam.py,
    agrees but for 50 warm-up steps. As there, the bias correction counts from the start of the run
    and not from the reset, and a coordinate whose v is still zero after the grace steps stays
    still until the next reset.
    """

    def init_fn(params: optax.Params) -> SpamState:
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        return SpamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update_fn(
        updates: optax.Updates, state: SpamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SpamState]:
        del params
        t = optax.safe_increment(state.step)
        keep = t % reset_every != 0
        mu, nu = (optax.tree.where(keep, m, optax.tree.zeros_like(m)) for m in state[1:])
        clips = (t % reset_every >= grace_steps) & (t >= grace_steps)
        clipped = jax.tree.map(lambda g, v: _clip_spikes(g, threshold * v, clips), updates, nu)
        mu = optax.tree.update_moment(clipped, mu, b1, 1)
        nu = optax.tree.update_moment(clipped, nu, b2, 2)
        scale = _warmup(t, reset_every, warmup_steps)
        scale *= jnp.sqrt(1 - b2 ** t.astype(jnp.float32)) / (1 - b1 ** t.astype(jnp.float32))
        steps = jax.tree.map(
            lambda g, m, v: (scale * m / (jnp.sqrt(v) + eps)).astype(g.dtype), updates, mu, nu
        )
        return steps, SpamState(t, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _clip_spikes(gradient: jax.Array, limit: jax.Array, clips: jax.Array) -> jax.Array:
    gradient = gradient.astype(jnp.float32)
    spike = clips & (gradient**2 > limit)
    return jnp.where(spike, jnp.sign(gradient) * jnp.sqrt(limit), gradient)


def _warmup(t: jax.Array, reset_every: int, warmup_steps: int) -> jax.Array:
    since = t % reset_every
    lost = 0.99 * (1 + jnp.cos(jnp.pi * since / (warmup_steps + 1))) / 2
    return jnp.where((t >= reset_every) & (since < warmup_steps), 1 - lost, 1.0)

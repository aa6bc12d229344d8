"""Stable-SPAM: Adam on gradients that are clipped and normalised by their own history."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class TensorState(NamedTuple):
    mu: jax.Array
    nu: jax.Array
    peak: jax.Array
    norm: jax.Array
    square_norm: jax.Array


class StableSpamState(NamedTuple):
    step: jax.Array
    tensors: optax.Params  # one TensorState per tensor


def scale_by_stable_spam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    gamma1: float = 0.7,
    gamma2: float = 0.9,
    gamma3: float = 0.999,
    reset_every: int = 1000,
) -> optax.GradientTransformation:
    """Adam behind AdaClip and AdaGN; to be followed by weight decay and learning rate.

    At step t = 1, 2, …, per tensor, where ^ divides a running mean by 1 − γᵗ::

        p ← γ3·p + (1 − γ3)·max|g|
        g ← g·p̂ / max|g|                   in the coordinates with |g| > p̂           (AdaClip)
        n ← γ1·n + (1 − γ1)·‖g‖,   q ← γ2·q + (1 − γ2)·‖g‖²
        g ← g/‖g‖ · n̂ / (√q̂ + eps)                                                 (AdaGN)

    then Adam on g, its moments and its step count reset every `reset_every` steps.

    Huang et al., "Stable-SPAM", arXiv:2502.17055 (the abstract of v3, which renames it, read).
    The official code was not at hand; formula and constants are those of
    github.com/kozistr/pytorch_optimizer, optimizer/spam.py, and of the page
    junaidaliop.github.io/zij/math/stablespamgradientstabilizer, which agree. Its optional cosine
    decay of b1 is off, as it is there by default. As there, a tensor whose gradient is zero is
    left as it is, but for p.
    """

    def init_fn(params: optax.Params) -> StableSpamState:
        return StableSpamState(jnp.zeros((), jnp.int32), jax.tree.map(_start, params))

    def update_fn(
        updates: optax.Updates, state: StableSpamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StableSpamState]:
        del params
        t = optax.safe_increment(state.step)

        def one(gradient: jax.Array, old: TensorState) -> tuple[jax.Array, TensorState]:
            highest = jnp.max(jnp.abs(gradient))
            peak = gamma3 * old.peak + (1 - gamma3) * highest
            g = _clip_peaks(gradient.astype(jnp.float32), highest, _debiased(peak, gamma3, t))
            norm = jnp.linalg.norm(g.ravel())
            mean = gamma1 * old.norm + (1 - gamma1) * norm
            square = gamma2 * old.square_norm + (1 - gamma2) * norm**2
            size = _debiased(mean, gamma1, t) / (jnp.sqrt(_debiased(square, gamma2, t)) + eps)
            step, mu, nu = adam(g * (size / norm), old)
            step, new = optax.tree.where(
                norm == 0,
                (jnp.zeros_like(step), old._replace(peak=peak)),
                (step, TensorState(mu, nu, peak, mean, square)),
            )
            return step.astype(gradient.dtype), new

        def adam(g: jax.Array, old: TensorState) -> tuple[jax.Array, jax.Array, jax.Array]:
            keep = t % reset_every != 0
            since = jnp.where(t < reset_every, t, t % reset_every + 1)
            mu = b1 * jnp.where(keep, old.mu, 0.0) + (1 - b1) * g
            nu = b2 * jnp.where(keep, old.nu, 0.0) + (1 - b2) * g**2
            return _debiased(mu, b1, since) / (jnp.sqrt(_debiased(nu, b2, since)) + eps), mu, nu

        pairs = jax.tree.map(one, updates, state.tensors)
        steps = jax.tree.map(lambda _, pair: pair[0], updates, pairs)
        tensors = jax.tree.map(lambda _, pair: pair[1], updates, pairs)
        return steps, StableSpamState(t, tensors)

    return optax.GradientTransformation(init_fn, update_fn)


def _start(tensor: jax.Array) -> TensorState:
    zeros, zero = jnp.zeros(tensor.shape), jnp.zeros(())
    return TensorState(zeros, zeros, zero, zero, zero)


def _clip_peaks(gradient: jax.Array, highest: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(gradient) > limit, gradient / highest * limit, gradient)


def _debiased(average: jax.Array, decay: float, step: jax.Array) -> jax.Array:
    return average / (1 - decay ** step.astype(jnp.float32))

"""StableAdamW: AdamW whose step is divided by Adafactor's update RMS, tensor by tensor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class StableAdamState(NamedTuple):
    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def stable_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    """AdamW with update clipping: per tensor, with the bias-corrected moments m̂ and v̂::

        RMS = √mean(g² / max(v̂, eps²))
        θ ← θ − η / max(1, RMS) · (m̂ / (√v̂ + eps) + weight_decay·θ)

    Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
    arXiv:2304.13013 (abstract read); formula from the documentation of github.com/warner-benjamin/
    optimi and from junaidaliop.github.io/zij/math/stableadamw; b2 and eps from the head of the
    authors' gist mitchellnw/d42e22a0b9ec02ceaf4f7b4457f51423. The two formulas differ in whether
    the RMS takes v or v̂; v̂ is used here, for v would clip every early step.
    """

    def init_fn(params: optax.Params) -> StableAdamState:
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        return StableAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update_fn(
        updates: optax.Updates, state: StableAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, StableAdamState]:
        if params is None:
            raise ValueError("stable_adamw needs params for its weight decay")
        t = optax.safe_increment(state.step)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        mu_hat = optax.tree.bias_correction(mu, b1, t)
        nu_hat = optax.tree.bias_correction(nu, b2, t)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            step = m / (jnp.sqrt(v) + eps) + weight_decay * p
            rms = jnp.sqrt(jnp.mean(g**2 / jnp.maximum(v, eps**2)))
            return (step / jnp.maximum(1.0, rms)).astype(g.dtype)

        steps = jax.tree.map(direction, updates, mu_hat, nu_hat, params)
        return steps, StableAdamState(t, mu, nu)

    return optax.chain(
        optax.GradientTransformation(init_fn, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )

"""Optimizers that come with the guard."""

from typing import Any

import optax

from lbw_optax.guard import lbw_guard


def adamw(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw`, governed: ``lbw_guard(optax.adamw(...))``.

    Takes the arguments of :func:`optax.adamw`. For other limits than the default ones, write
    ``lbw_guard(optax.adamw(...), min_scale=...)``.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> tx = lbw_optax.adamw(3e-3, weight_decay=0.01)
      >>> state = tx.init(jnp.ones(3))
    """
    return lbw_guard(optax.adamw(*args, **kwargs))


adamw.__wrapped__ = optax.adamw  # type: ignore[attr-defined]  # inspect.signature shows its own

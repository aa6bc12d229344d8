"""Update-norm clip: shorten a step that is far longer than the recent ones."""

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers import history
from benchmarks.peers.norms import global_norm


def clip_by_update_history(window: int = 128, sigmas: float = 3.0) -> optax.GradientTransformation:
    """Clips the norm n of the update at mean + sigmas · std of the `window` updates before.

    To be placed after the optimizer. Nothing is clipped until half the window is known; the
    history takes the unclipped norm, so that the limit can rise again.

    Rule and constants: github.com/stanford-crfm/levanter, optim/clip_update_norm.py.
    """

    def init_fn(params: optax.Params) -> history.History:
        del params
        return history.empty(window)

    def update_fn(
        updates: optax.Updates, state: history.History, params: optax.Params | None = None
    ) -> tuple[optax.Updates, history.History]:
        del params
        norm = global_norm(updates)
        highest = history.limit(state, sigmas)
        factor = jnp.where(norm > highest, highest / jnp.maximum(norm, 1e-6), 1.0)
        updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        return updates, history.push(state, norm)

    return optax.GradientTransformation(init_fn, update_fn)

"""The classifier's read-out goes on learning in the run itself, from predictions that are settled.

Off unless a user asks for it. What is learned is a shift of the shipped weights of the two
probabilities, within a ball around them; the unit and the kinds stay as they were shipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.apply import either

# Every so many steps a prediction is remembered, and it is settled after so many.
EVERY, SETTLED = 5, 50
SLOTS = SETTLED // EVERY
# A prediction that was wrong by 1 moves its own logit by this,
RATE = 0.5
# and all of them together move the weights of each probability by this at most.
RADIUS = 0.5


class Adapted(NamedTuple):
    """What was learned in this run, and the predictions that are not settled yet.

    With C cells of the unit.

    Attributes:
      shift: of the shipped weights and biases, float32[C + 1, 2].
      kept: the cells of each prediction and a 1, float32[10, C + 1]; zeros where there is none.
      place: int32, of the step among 50: which of them is the oldest.
    """

    shift: jax.Array
    kept: jax.Array
    place: jax.Array


def init(cells: int, probabilities: int) -> Adapted:
    """Nothing is learned."""
    return Adapted(
        jnp.zeros([cells + 1, probabilities], jnp.float32),
        jnp.zeros([SLOTS, cells + 1], jnp.float32),
        jnp.zeros([], jnp.int32),
    )


def settle(
    before: Adapted, weights: jax.Array, horizons: jax.Array, diverged: jax.Array
) -> Adapted:
    r"""Learn from the predictions of which it is known by now what came of them.

    With x the cells of a prediction and a 1, W the shipped weights and D their shift, y whether the
    run has diverged within the horizon, over the predictions that are settled by this step,

    .. math::
      D \leftarrow \Pi_R\Big(D - \eta \sum_x \frac{x}{|x|^2}
      \big(\sigma((W + D)^\top x) - y\big)^\top\Big),

    a normalised step on the log loss, with \Pi_R the projection of each column on the ball of
    radius R. A prediction is settled when the run has diverged, and then it is forgotten with all
    others; or fifty steps after it was made. A sum that is not finite changes nothing.

    Args:
      before: after the step before.
      weights: float32[C + 1, P], the shipped ones.
      horizons: int32[P], of the probabilities, in steps.
      diverged: bool scalar, whether the run has, by this step.
    """
    slots = jnp.arange(SLOTS)
    newest, since = jnp.divmod(before.place, EVERY)
    due = (slots == newest) & (since == 0)
    age = jnp.where(due, SETTLED, (newest - slots) % SLOTS * EVERY + since)
    settled = (due | diverged)[:, None]

    x = jnp.where(settled, before.kept, 0.0)
    y = diverged & (age[:, None] <= horizons[None])
    wrong = jax.nn.sigmoid(x @ (weights + before.shift)) - y
    length = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    moved = before.shift - RATE * (x / jnp.where(length > 0, length, 1.0)).T @ wrong
    far = jnp.sqrt(jnp.sum(jnp.square(moved), axis=0, keepdims=True))
    moved = moved * jnp.minimum(1.0, RADIUS / jnp.where(far > 0, far, 1.0))
    return before._replace(
        shift=either(jnp.isfinite(moved).all(), moved, before.shift),
        kept=jnp.where(settled, 0.0, before.kept),
    )


def keep(before: Adapted, cells: jax.Array, counts: jax.Array) -> Adapted:
    """Remember a prediction, every few steps.

    Args:
      before: when what this step settles has been learned.
      cells: float32[C], of this step.
      counts: bool scalar, False where nothing is predicted any more: all are forgotten.
    """
    slot, since = jnp.divmod(before.place, EVERY)
    here = (jnp.arange(SLOTS) == slot) & (since == 0)
    kept = jnp.where(here[:, None], extended(cells)[None], before.kept)
    return before._replace(kept=jnp.where(counts, kept, 0.0), place=(before.place + 1) % SETTLED)


def extended(cells: jax.Array) -> jax.Array:
    """The cells and a 1, by which the bias is a weight as all others."""
    return jnp.append(cells, jnp.ones([], cells.dtype))

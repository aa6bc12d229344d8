"""What the guard remembers of its model's activations: scalars, whatever the number of layers.

It advises and nothing else: no rule of the law reads it, and neither does the classifier, whose
weights were made from runs without it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax.activations import Activations, Outliers, stacked
from lbw_optax.apply import either
from lbw_optax.law import statistics
from lbw_optax.law.statistics import Running

# How the spread over layers is remembered: over about a hundred steps. Its unit is a logarithm.
SPREAD = statistics.Memory(decay=0.99, floor=0.05, prior=0.3)


class Layers(NamedTuple):
    """The newest activations, all layers in a few numbers: scalars.

    What could not be measured keeps its last value, so that no NaN enters the state.
    """

    outlier_share: jax.Array  # float32, the largest of the layers
    peak: jax.Array  # float32, max / RMS, the largest of the layers
    farthest: jax.Array  # int32, of that peak, or the first that is not finite; -1: none
    spread: jax.Array  # float32, standard deviation of log peak over layers
    drift: jax.Array  # float32, the spread less its slow mean, in standard deviations of it
    attention_logit: jax.Array  # float32, the largest
    nonfinite: jax.Array  # int32, layers, and logits, that are not finite
    usual: Running  # of the spread, slow and winsorised


def init() -> Layers:
    """Before the first activations, and for ever where none are given."""
    zero, whole = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
    usual = Running(zero, zero, zero)
    return Layers(zero, zero, whole - 1, zero, zero, zero, whole, usual)


def absorb(before: Layers, activations: Activations | None) -> Layers:
    r"""Take the activations of one step in; without any, all stays as it is.

    With P_l the peak of layer l, over the layers that are finite,

    .. math::
      \mathrm{spread} = \mathrm{std}_l \log \max(P_l, 1), \qquad
      \mathrm{drift} = (\mathrm{spread} - m) / s

    m and s are mean and standard deviation of the spreads before, over about a hundred steps and
    winsorised (:func:`lbw_optax.law.statistics.update`), so that a layer that runs away stands out
    and is taken as usual only in the long run.

    Args:
      before: of the steps before.
      activations: as `lbw_optax.activations.Activations`; None: none.

    Raises:
      ValueError: if they are something else.
    """
    if activations is None:
        return before
    outliers, logits = stacked(activations)
    if not outliers.peak.size and not logits.size:
        return before
    after = before._replace(nonfinite=jnp.int32(0))
    if outliers.peak.size:
        after = _outliers(after, outliers)
    if logits.size:
        finite = jnp.isfinite(logits)
        largest = jnp.max(jnp.where(finite, logits, -jnp.inf))
        after = after._replace(
            attention_logit=jnp.where(finite.any(), largest, before.attention_logit),
            nonfinite=after.nonfinite + jnp.sum(~finite, dtype=jnp.int32),
        )
    return after


def _outliers(before: Layers, outliers: Outliers) -> Layers:
    share, peak = outliers
    finite = jnp.isfinite(share) & jnp.isfinite(peak)
    known = finite.any()
    spread = _spread(jnp.log(jnp.maximum(jnp.where(finite, peak, 1.0), 1.0)), finite)
    away = (spread - before.usual.mean) / statistics.std(before.usual, SPREAD)
    # The first of several is where it began.
    farthest = jnp.where(finite.all(), jnp.argmax(peak), jnp.argmin(finite)).astype(jnp.int32)
    newest = before._replace(
        outlier_share=jnp.max(jnp.where(finite, share, 0.0)),
        peak=jnp.max(jnp.where(finite, peak, 0.0)),
        spread=spread,
        drift=jnp.where(before.usual.weight > 0, away, 0.0),
    )
    return either(known, newest, before)._replace(
        farthest=farthest,
        nonfinite=jnp.sum(~finite, dtype=jnp.int32),
        usual=statistics.update(before.usual, spread, known, SPREAD),
    )


def _spread(heights: jax.Array, counted: jax.Array) -> jax.Array:
    layers = jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
    mean = jnp.sum(heights * counted) / layers
    return jnp.sqrt(jnp.sum(jnp.square(heights - mean) * counted) / layers)

"""What the newest steps say of the next ones: how likely the run diverges soon, and of what kind.

The classifier advises and nothing else: no rule of the law reads it. It is a gated recurrent unit
of 16 cells over 16 inputs, all of them free of the unit of the loss and of the size of the model,
so that it reads a log of loss and gradient norm as well as a run that is under the guard.
`python -m benchmarks.classifier train` makes its weights.
"""

import enum
import functools
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax.apply import either
from lbw_optax.law import adapting, control, divergence, events, statistics
from lbw_optax.law.adapting import Adapted
from lbw_optax.law.control import Action, Decision
from lbw_optax.law.divergence import Divergence
from lbw_optax.law.statistics import Running, Statistics
from lbw_optax.law.telemetry import Telemetry

INPUTS, CELLS = 16, 16
# Steps ahead of which a probability is given.
HORIZONS = (10, 50)
# How log |g| is remembered beside the law's own memory, which is five times as short.
SLOW = statistics.Memory(decay=0.99, floor=0.1, prior=1.0)
# An alarm ends when the risk is below this share of what begins it.
CALM = 0.5
# A log of one norm, or of none, says nothing about gradients.
LEAST_VARIANCE = 1e-12


class Kind(enum.IntEnum):
    """What stands behind a step that stands out."""

    HARD_BATCH = 0  # it is gone by itself
    UNSTABLE_DYNAMICS = 1  # steps are too long
    BROKEN_STATE = 2  # or broken numbers


class View(NamedTuple):
    """What the law knows of a step, as the classifier reads it."""

    known: Statistics  # before the step
    now: Statistics  # after it
    diverging: Divergence  # after it
    age: jax.Array  # int32, of the law, after it
    seen: Telemetry  # what the step showed


class Risk(NamedTuple):
    """What it says of a step; all in [0, 1].

    Attributes:
      soon: float32, the probability that the run diverges within 10 steps.
      later: float32, the same within 50 steps.
      kinds: float32[3], the probability of each `Kind`, given that something stands out.
    """

    soon: jax.Array
    later: jax.Array
    kinds: jax.Array


class Memory(NamedTuple):
    """What the classifier remembers from step to step."""

    cells: jax.Array  # float32[16]
    log_norm: Running  # of log |g|, slow
    risk: Risk  # of the newest step
    alarmed: jax.Array  # bool, since the risk was above `Weights.alarm`, until it is below half
    adapted: Adapted | tuple[()] = ()  # what it has learned in this run; () where it does not learn


class Weights(NamedTuple):
    """Of the unit and of what is read from it; float32."""

    inputs: jax.Array  # [16 inputs, 3 gates of 16 cells]
    cells: jax.Array  # [16 cells, 3 gates of 16 cells]
    bias: jax.Array  # [3 gates of 16 cells]
    outputs: jax.Array  # [16 cells, 5]
    output_bias: jax.Array  # [5]: soon, later, and three kinds
    alarm: jax.Array  # scalar, the probability within 10 steps from which a person should look


def init(*, adapts: bool = False) -> Memory:
    """Before the first step; `adapts`: it goes on learning in the run."""
    zero = jnp.zeros([], jnp.float32)
    return Memory(
        cells=jnp.zeros([CELLS], jnp.float32),
        log_norm=Running(zero, zero, zero),
        risk=Risk(zero, zero, jnp.full([len(Kind)], 1 / len(Kind), jnp.float32)),
        alarmed=jnp.zeros([], bool),
        adapted=adapting.init(CELLS, len(HORIZONS)) if adapts else (),
    )


def step(memory: Memory, view: View, weights: Weights | None = None) -> Memory:
    """Take one step in.

    Args:
      memory: after the step before.
      view: what the law knows of this step.
      weights: others than the shipped ones, for experiments.
    """
    weights = weights or shipped()
    found, log_norm = inputs(memory.log_norm, view)
    cells = advance(weights, memory.cells, found)
    broken = view.seen.nonfinite_loss > 0
    shown = view.seen.has_loss | view.seen.has_gradient | broken
    adapted = adapt(memory.adapted, weights, cells, view.diverging.loss_excess, broken)
    told = either(shown, risk(weights, cells, broken, adapted), memory.risk)
    limit = jnp.where(memory.alarmed, CALM * weights.alarm, weights.alarm)
    return Memory(cells, log_norm, told, told.soon > limit, adapted)


def adapt(
    adapted: Adapted | tuple[()],
    weights: Weights,
    cells: jax.Array,
    loss_excess: jax.Array,
    broken: jax.Array,
) -> Adapted | tuple[()]:
    """Learn from what is settled by this step, and remember it; see :mod:`lbw_optax.law.adapting`.

    The run has diverged where the law's own evidence of a lasting rise of the loss is full. A loss
    that is not finite teaches nothing, for mostly nothing has announced it.
    """
    if not isinstance(adapted, Adapted):
        return ()
    diverged = loss_excess >= divergence.ENOUGH_EVIDENCE
    adapted = adapting.settle(adapted, _of_risk(weights), jnp.array(HORIZONS), diverged)
    return adapting.keep(adapted, cells, ~(diverged | broken))


def after_rollback(memory: Memory, left: Memory) -> Memory:
    """What was learned in the run that is left stays learned; its predictions are of no run now."""
    if not (isinstance(memory.adapted, Adapted) and isinstance(left.adapted, Adapted)):
        return memory
    fresh = adapting.init(CELLS, len(HORIZONS))
    return memory._replace(adapted=fresh._replace(shift=left.adapted.shift))


def reported(decision: Decision, before: Memory, after: Memory) -> Decision:
    """The decision as it is recorded: an alarm that begins, where there is nothing else.

    Of a step with an action that action is the news, and so it is of an alarm that begins with it.

    Args:
      decision: of the law.
      before: what the classifier remembered before this step.
      after: what it remembers after it.
    """
    begins = after.alarmed & ~before.alarmed & (decision.action == Action.NONE)

    alarm = decision._replace(
        action=jnp.int32(events.ALARM),
        signal=jnp.int32(events.RISK),
        value=after.risk.soon,
        threshold=jnp.float32(shipped().alarm),
    )
    return Decision(*either(begins, alarm, decision))


def risk(
    weights: Weights,
    cells: jax.Array,
    broken: jax.Array,
    adapted: Adapted | tuple[()] = (),
) -> Risk:
    """What the steps up to now say of the next ones.

    What diverges within 10 steps does so within 50, and a loss that is not finite has diverged.

    Args:
      weights: of the classifier.
      cells: float32[16], after the newest step.
      broken: bool scalar, whether its loss was not finite.
      adapted: what was learned in the run.
    """
    logits = read_out(weights, cells)
    if isinstance(adapted, Adapted):
        logits = logits.at[: len(HORIZONS)].add(adapting.extended(cells) @ adapted.shift)
    soon, later = (jnp.where(broken, 1.0, jax.nn.sigmoid(logits[i])) for i in range(2))
    return Risk(soon, jnp.maximum(soon, later), jax.nn.softmax(logits[2:]))


def inputs(log_norm: Running, view: View) -> tuple[jax.Array, Running]:
    """The 16 inputs of a step, float32 of about unit size, and the slow memory of log |g|.

    Of the loss: how far it is from its mean, how far the fast mean is from the slow one, how far it
    is above its lowest level in standard deviations and as a share of what it has fallen, and the
    evidence of a lasting rise. Of the gradient norm: how far it is from its mean, from its slow
    mean, and the one mean from the other. The overshoot's mean and newest value; the relative step
    over its ceiling; the age of the law; what was not measured or not finite. 0 says nothing.
    """
    known, now, diverging, age, seen = view
    y, has_loss = statistics.relative_loss(known, seen), statistics.has_level(seen)
    loss_std = statistics.std(known.loss, statistics.LOSS)
    fell = now.loss_start.mean - diverging.lowest
    has_lowest = diverging.lowest < statistics.LARGEST
    above = jnp.where(has_lowest, diverging.recent - diverging.lowest, 0.0)
    lost = jnp.where(has_lowest & (fell > 0), above / jnp.where(fell > 0, fell, 1.0), 0.0)

    has_norm = seen.has_gradient & (seen.gradient_norm > 0)
    log_now = jnp.log(jnp.where(has_norm, seen.gradient_norm, 1.0))
    slow = statistics.update(log_norm, log_now, has_norm, SLOW)
    has_norm = has_norm & (slow.variance > LEAST_VARIANCE)
    slow_std = statistics.std(log_norm, SLOW)

    has_step = seen.has_step & (seen.relative_step > 0)
    log_step = jnp.log(jnp.where(has_step, seen.relative_step, 1.0))
    log_step = log_step - control.log_ceiling(age + 1, jnp.float32(0))
    overshoots = now.overshoot.variance > 0

    broken = (seen.nonfinite_loss > 0) | (seen.nonfinite_gradients > 0)
    broken_state = seen.updates_broken | seen.parameters_broken | (seen.nonfinite_updates > 0)
    found = [
        jnp.where(has_loss, _squashed((y - known.loss.mean) / loss_std), 0.0),
        _squashed((now.loss.mean - now.loss_slow.mean) / loss_std),
        _squashed(above / diverging.quiet_std),
        jnp.clip(lost, -1.0, 4.0) / 2,
        diverging.loss_excess / divergence.ENOUGH_EVIDENCE,
        jnp.where(
            has_norm,
            _squashed(
                (log_now - known.gradient.mean)
                / statistics.std(known.gradient, statistics.GRADIENT)
            ),
            0.0,
        ),
        jnp.where(has_norm, _squashed((log_now - log_norm.mean) / slow_std), 0.0),
        jnp.where(has_norm, _squashed((now.gradient.mean - slow.mean) / slow_std), 0.0),
        jnp.where(overshoots, _squashed(statistics.in_stds(now.overshoot)), 0.0),
        jnp.where(overshoots, now.overshoot.last, 0.0),
        jnp.where(has_step & (age > 1), jnp.clip(log_step / 3, -2.0, 2.0), 0.0),
        1 / jnp.sqrt(age.astype(jnp.float32) + 1),
        has_norm,
        overshoots,
        broken,
        broken_state,
    ]
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in found]), slow


def advance(weights: Weights, cells: jax.Array, found: jax.Array) -> jax.Array:
    r"""One step of the unit, the cells after it.

    .. math::
      (z, r) = \sigma(W x + U h + b), \qquad n = \tanh(W_n x + r \odot (U_n h) + b_n), \qquad
      h \leftarrow (1 - z) \odot n + z \odot h

    Source: Cho et al., 2014 (arXiv:1406.1078), with the reset gate after the product.
    """
    x = found @ weights.inputs + weights.bias
    h = cells @ weights.cells
    gates = jax.nn.sigmoid(x[: 2 * CELLS] + h[: 2 * CELLS])
    keep, reset = gates[:CELLS], gates[CELLS:]
    new = jnp.tanh(x[2 * CELLS :] + reset * h[2 * CELLS :])
    return (1 - keep) * new + keep * cells


def read_out(weights: Weights, cells: jax.Array) -> jax.Array:
    """Logits, float32[..., 5], of cells, float32[..., 16]."""
    read = cells @ weights.outputs
    return read + jnp.broadcast_to(weights.output_bias, read.shape)


def _of_risk(weights: Weights) -> jax.Array:
    """What the two probabilities are read with, float32[16 + 1, 2]; the bias is the last row."""
    rows = jnp.concatenate([jnp.asarray(weights.outputs), weights.output_bias[None]])
    return rows[:, : len(HORIZONS)]


@functools.cache
def shipped() -> Weights:
    """The weights of the package."""
    with (resources.files("lbw_optax.law") / "classifier.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        return Weights(**stored)


def _squashed(x: jax.Array) -> jax.Array:
    """Linear near 0 and logarithmic far from it."""
    return jnp.arcsinh(x) / 3

"""One step of the law: arrive, absorb, judge, decide, assess, classify."""

from typing import NamedTuple

import jax

from lbw_optax.law import classifier, control, divergence, statistics
from lbw_optax.law.control import RULES, Bounds, Control, Decision, Rules, Signal
from lbw_optax.law.divergence import Divergence
from lbw_optax.law.statistics import Statistics
from lbw_optax.law.telemetry import Telemetry


class Law(NamedTuple):
    """All that the law remembers from step to step: scalars, and sixteen cells."""

    statistics: Statistics
    control: Control
    divergence: Divergence
    classifier: classifier.Memory


def init(bounds: Bounds, *, adapts: bool = False) -> Law:
    """Before the first step; `adapts`: the classifier goes on learning in the run."""
    return Law(
        statistics.init(),
        control.init(bounds),
        divergence.init(),
        classifier.init(adapts=adapts),
    )


def step(
    law: Law,
    seen: Telemetry,
    bounds: Bounds,
    rules: Rules = RULES,
    alarm: jax.Array | None = None,
) -> tuple[Law, Decision]:
    """What to do about one step, from what it showed and from the steps before it.

    Args:
      law: the state after the step before.
      seen: what this step showed.
      bounds: the user's limits.
      rules: what moves the scale; others than the law's own are for experiments.
      alarm: bool scalar, a user's own signal acts; None: there is none.
    """
    arrival = control.arrive(seen, law.statistics)
    jumped = arrival.jumps | arrival.spikes
    arrival = arrival if alarm is None else control.heed(arrival, alarm)
    rejected = control.reject(arrival, seen)
    left_out = (rejected != Signal.NONE) | arrival.limited
    remembered = statistics.absorb(
        law.statistics,
        seen,
        jumped,
        arrival.log_factor,
        left_out,
        law.control.age,
    )
    evidence = control.judge(law.control, seen, law.statistics, remembered, arrival, rules)
    held, decision = control.decide(law.control, evidence, bounds)
    diverging = divergence.assess(
        law.divergence, seen, law.statistics, rejected, held.skips_in_a_row
    )
    # It advises: nothing above reads it.
    view = classifier.View(law.statistics, remembered, diverging, held.age, seen)
    advised = classifier.step(law.classifier, view)
    return Law(remembered, held, diverging, advised), decision

"""One step of the law: reject, absorb, judge, decide, assess."""

from typing import NamedTuple

from lbw_optax.law import control, divergence, statistics
from lbw_optax.law.control import Alarm, Bounds, Control, Decision, Signal
from lbw_optax.law.divergence import Divergence
from lbw_optax.law.statistics import Statistics
from lbw_optax.law.telemetry import Telemetry


class Law(NamedTuple):
    """All that the law remembers from step to step: scalars."""

    statistics: Statistics
    control: Control
    divergence: Divergence


def init(bounds: Bounds) -> Law:
    """Before the first step."""
    return Law(statistics.init(), control.init(bounds), divergence.init())


def step(
    law: Law, seen: Telemetry, bounds: Bounds, alarm: Alarm = control.alarm
) -> tuple[Law, Decision]:
    """What to do about one step, from what it showed and from the steps before it.

    Args:
      law: the state after the step before.
      seen: what this step showed.
      bounds: the user's limits.
      alarm: how much too large the scale is; another than the law's own is for experiments.
    """
    rejected = control.reject(seen, law.statistics)
    remembered = statistics.absorb(law.statistics, seen, rejected != Signal.NONE)
    evidence = control.judge(law.control, seen, law.statistics, remembered, rejected, alarm)
    held, decision = control.decide(law.control, evidence, bounds)
    diverging = divergence.assess(
        law.divergence, seen, law.statistics, rejected, held.skips_in_a_row
    )
    return Law(remembered, held, diverging), decision

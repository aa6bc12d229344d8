"""What a guard's state means, in words. On the host, for states that are already there."""

import logging
import math
from typing import Any

import numpy as np

from lbw_optax.law import classifier, control, events
from lbw_optax.law.control import REGIMES, REJECTED_BOUND, REJECTED_FROM, REST_STEPS, Signal
from lbw_optax.law.divergence import Reason
from lbw_optax.law.events import Event
from lbw_optax.law.freezing import Freezing
from lbw_optax.names import decoded
from lbw_optax.state import GuardState, Mode

CAUSES = {
    "nonfinite_gradients": "gradients are not finite",
    "nonfinite_loss": "the loss is not finite",
    "nonfinite_updates": "the optimizer's updates are not finite though the gradients are",
    "gradient_norm": "the gradient is far longer than this run has shown",
    "loss": "the loss jumped",
    "overshoot": "steps go too far",
    "relative_step": "steps are too long for the parameters",
    "risk": "its last steps look like those before a divergence",
}
# Of one group of leaves.
OWN_CAUSES = {
    "nonfinite_gradients": "its gradient is not finite",
    "gradient_norm": "its gradient is far longer than it has been, and those of the others are not",
    "relative_step": "its step is far longer than it has been, and those of the others are not",
}
ASKS = {
    Reason.PARAMETERS: "the parameters are broken",
    Reason.INNER_STATE: "the optimizer's state makes broken updates out of sound gradients",
    Reason.SKIPS: "too many steps in a row were skipped",
    Reason.LOSS: "the loss has risen and stays there",
    Reason.REQUEST: "a person asked for it",
}
# Up to this many interventions are told when a run is stopped.
TOLD = 5


def explain(guard: GuardState) -> str:
    """One sentence: the most urgent of what is going on."""
    held = guard.law.control
    if held.exhausted:
        return exhausted(guard)
    if guard.law.divergence.rollback_asked:
        return (
            f"Asking for a rollback at step {int(guard.guard_steps)}: "
            f"{ASKS[Reason(int(guard.law.divergence.rollback_asked))]}. RollbackManager answers; "
            "without one, restore a checkpoint from before it began to ask (rollback_asked in the "
            "log), or go on with lbw_optax.reset(state)."
        )
    sentence = _scaling(guard) + _freezing(guard) + _rejecting(guard) + _risking(guard)
    return (
        sentence if acts(guard) else f"{_only_watches(guard)} Governing, it would say: {sentence}"
    )


def exhausted(guard: GuardState) -> str:
    """Why a run is stopped, and what to do."""
    held = guard.law.control
    told = "; ".join(_tell(event) for event in read_events(guard)[-TOLD:])
    kept = "A skipped step changed no parameter."
    reason = Reason(int(guard.law.divergence.rollback_asked))
    asks = f" It asks to go back: {ASKS[reason]}." if reason in ASKS else ""
    return (
        f"The guard is exhausted after {int(guard.guard_steps)} steps: {int(held.skips)} "
        f"skipped in all, {int(held.skips_in_a_row)} in a row, scale "
        f"{math.exp(held.log_scale):.3g}, regime {REGIMES[held.regime]}. Last interventions: "
        f"{told}. {kept if acts(guard) else _only_watches(guard)}{asks} Look at the data and the "
        "learning rate, restore an earlier checkpoint, or go on with lbw_optax.reset(state), which "
        "clears this."
    )


def _scaling(guard: GuardState) -> str:
    """What becomes of the updates."""
    held, step = guard.law.control, int(guard.guard_steps)
    scale = f"{_plain(100 * math.exp(held.log_scale))} %"
    if held.skips_in_a_row:
        return f"Skipping since step {step - int(held.skips_in_a_row)}: {_last_cause(guard)}."
    if held.pinned:
        end = 'lbw_optax.override(state, scale="auto")'
        return f"A person holds updates at {scale}; {end} gives them back."
    if held.log_scale >= math.log(control.FULL):
        return f"Nominal at step {step}: updates at {scale}, {int(held.skips)} steps skipped."
    rests = int(held.rest.steps) >= REST_STEPS
    if not (held.settled or rests):
        return f"Soft start, step {step}: updates at {scale}, growing while steps fall short."
    since = step - 1 - int(held.rest.steps) if rests else None
    high = too_high(math.exp(held.log_scale), acts=acts(guard))
    return f"Holding updates at {scale}{_since(guard, since)}: {high}."


def too_high(scale: float, *, acts: bool) -> str:
    """What a scale below 1 says of the learning rate.

    Only where it is applied does it come to rest where steps are right. Else nothing answers, and
    it falls on with every step: how far tells the time, not the rate.

    >>> too_high(0.02, acts=True)
    'the learning rate looks 50 times too high'
    """
    if acts:
        return f"the learning rate looks {_plain(1 / max(scale, 1e-30))} times too high"
    return "the learning rate looks too high, by how much only a guard that governs can tell"


def read_events(guard: GuardState) -> list[Event]:
    """Those in the ring of one guard, with the names of what is frozen."""
    groups, custom = guard.freezing, guard.custom
    return events.read(
        guard.events,
        decoded(groups.names) if groups else (),
        decoded(custom.names) if custom else (),
    )


def frozen_now(guard: GuardState) -> dict[str, int]:
    """The names of what is frozen in one guard, and for how many steps it has been."""
    held = guard.freezing
    if not isinstance(held, Freezing):
        return {}
    frozen, since = np.asarray(held.frozen), np.asarray(held.since)
    return {x: int(n) for x, f, n in zip(decoded(held.names), frozen, since, strict=True) if f}


def _freezing(guard: GuardState) -> str:
    """What to say of the groups that are frozen."""
    now = frozen_now(guard)
    if not now:
        return ""
    held = guard.freezing
    assert isinstance(held, Freezing)
    signals = {Signal(int(x)) for x in np.asarray(held.reason)[np.asarray(held.frozen)]}
    why = "; ".join(OWN_CAUSES.get(x.name.lower(), x.name.lower()) for x in sorted(signals))
    names = ", ".join(f"{name} ({plural(steps, 'step')})" for name, steps in now.items())
    return f" Frozen while the rest trains: {names}: {why}."


def _rejecting(guard: GuardState) -> str:
    """What to say of the share of rejected steps, if it is high."""
    rejections = guard.law.control.rejections
    if float(rejections.share) <= REJECTED_BOUND or int(rejections.steps) < REJECTED_FROM:
        return ""
    why = CAUSES.get(Signal(int(rejections.newest)).name.lower(), "steps are rejected")
    return (
        f" {_plain(100 * float(rejections.share))} % of the last {int(rejections.steps)} steps "
        f"were rejected, the newest for this: {why}. Look at the data."
    )


def _risking(guard: GuardState) -> str:
    """What to say of the risk, if it is high."""
    soon = float(guard.law.classifier.risk.soon)
    if soon <= float(classifier.shipped().alarm):
        return ""
    return (
        f" The run may diverge within 10 steps: its newest ones look like those before a "
        f"divergence (probability {_plain(100 * soon)} %). Nothing is done for this alone."
    )


def cause(action: str, signal: str) -> str:
    """Why an intervention was made; of a signal that is not known, its name.

    >>> cause("skip", "loss"), cause("rollback", "loss")
    ('the loss jumped', 'the loss has risen and stays there')
    """
    if action in ("freeze", "thaw"):
        return OWN_CAUSES.get(signal, signal)
    if action == "rollback" and signal.upper() in Reason.__members__:
        return ASKS.get(Reason[signal.upper()], signal)
    return CAUSES.get(signal, signal)


_CALM_ACTIONS = ("recover", "cut", "restored", "thaw")


def logged(line: dict[str, Any], *, acts: bool = True) -> tuple[int, str]:
    """An intervention as the audit log has it, for the `logging` module: level and sentence.

    `acts` says whether the guard's decisions are applied.
    """
    action, step = line["action"], line.get("step")
    level = logging.INFO if action in _CALM_ACTIONS else logging.WARNING
    where = f"{line['guard']}: " if line.get("guard") else ""
    said = _say(line, acts)
    return level, where + (said if step is None else f"Step {step}: {said}.")


def _say(line: dict[str, Any], acts: bool) -> str:
    action, why = line["action"], cause(line["action"], str(line.get("signal", "")))
    if action == "lost":
        return f"{line['interventions']} interventions were not read in time, and are lost."
    if action == "restored":
        return (
            "The run went on from an older state: interventions from number "
            f"{line['from_number']} on are written anew."
        )
    share = _plain(100 * line["rate_multiple"])
    rows = f" {line['count']} times, to step {line['last_step']}" if "count" in line else ""
    return {
        "skip": f"skipped{rows}, because {why}",
        "clip": f"gradient scaled back{rows}, because {why}",
        "cut": f"updates cut to {share} %: {why}",
        "recover": f"updates grow again, at {share} %",
        "held": f"holding updates at {share} %: {too_high(line['rate_multiple'], acts=acts)}",
        "rejecting": (
            f"{_plain(100 * line.get('value', 0.0))} % of the steps of late were rejected, the "
            f"newest for this: {why}; look at the data"
        ),
        "alarm": (
            f"the run may diverge within 10 steps, with probability "
            f"{_plain(100 * line.get('value', 0.0))} %: {why}; nothing is done for this alone"
        ),
        "freeze": f"{line.get('group')} is frozen while the rest trains: {why}",
        "thaw": f"{line.get('group')} trains again, at a tenth of the scale for a start",
        "rollback": _back(line.get("from_step"), line.get("to_step"), why),
    }.get(action, action)


def _back(from_step: int | None, to_step: int | None, why: str) -> str:
    return f"back from step {from_step} to {to_step}, because {why}"


def plural(count: int, what: str) -> str:
    """A count and what is counted.

    >>> plural(1, "step"), plural(3, "step")
    ('1 step', '3 steps')
    """
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _plain(x: float) -> str:
    """Two digits, without an exponent.

    >>> _plain(100.0), _plain(540.3), _plain(0.18), _plain(2.0)
    ('100', '540', '0.18', '2')
    """
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _tell(event: Event) -> str:
    if event.from_step is not None:
        return _back(event.from_step, event.to_step, cause(event.action, event.signal))
    if event.group:
        return f"step {event.step}: {event.action} of {event.group} for {event.signal}"
    return (
        f"step {event.step}: {event.action} for {event.signal} = {event.value:.3g} "
        f"(threshold {event.threshold:.3g})"
    )


def _last_cause(guard: GuardState) -> str:
    return next(
        (CAUSES[e.signal] for e in reversed(read_events(guard)) if e.signal in CAUSES),
        "steps are rejected",
    )


def _since(guard: GuardState, rests_since: int | None) -> str:
    """Since the scale has kept still, or else since it was last cut."""
    if rests_since is not None:
        return f" since step {max(rests_since, 0)}"
    cuts = [e.step for e in read_events(guard) if e.action == "cut"]
    return f" since step {cuts[-1]}" if cuts else " since the start"


def acts(guard: GuardState) -> bool:
    """Whether its decisions are applied: not when it observes, nor before an optimizer."""
    return int(guard.mode) == Mode.GOVERN and guard.probe.parameters is None


def _only_watches(guard: GuardState) -> str:
    if int(guard.mode) == Mode.OBSERVE:
        return "It only observes: the optimizer's own updates were applied."
    return (
        "It is chained before the optimizer: gradients that are not finite became zero, and those "
        "whose length or loss jumped were scaled back."
    )

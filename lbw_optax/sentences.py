"""What a guard's state means, in words. On the host, for states that are already there."""

import math

from lbw_optax.law import control, events
from lbw_optax.law.control import REGIMES, Action
from lbw_optax.law.divergence import Reason
from lbw_optax.law.events import Event
from lbw_optax.state import GuardState, Mode

CAUSES = {
    "nonfinite_gradients": "gradients are not finite",
    "nonfinite_loss": "the loss is not finite",
    "nonfinite_updates": "the optimizer's updates are not finite though the gradients are",
    "gradient_norm": "the gradient is far longer than this run has shown",
    "loss": "the loss jumped",
    "overshoot": "steps go too far",
    "relative_step": "steps are too long for the parameters",
}
ASKS = {
    Reason.PARAMETERS: "the parameters are broken",
    Reason.INNER_STATE: "the optimizer's state makes broken updates out of sound gradients",
    Reason.SKIPS: "too many steps in a row were skipped",
    Reason.LOSS: "the loss has risen and stays there",
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
            "without one, restore a checkpoint, or go on with lbw_optax.reset(state)."
        )
    sentence = _scaling(guard)
    return (
        sentence if _acts(guard) else f"{_only_watches(guard)} Governing, it would say: {sentence}"
    )


def exhausted(guard: GuardState) -> str:
    """Why a run is stopped, and what to do."""
    held = guard.law.control
    told = "; ".join(_tell(event) for event in events.read(guard.events)[-TOLD:])
    kept = "The parameters are as they were before the skipped steps."
    return (
        f"The guard is exhausted after {int(guard.guard_steps)} steps: {int(held.skips)} "
        f"skipped in all, {int(held.skips_in_a_row)} in a row, scale "
        f"{math.exp(held.log_scale):.3g}, regime {REGIMES[held.regime]}. Last interventions: "
        f"{told}. {kept if _acts(guard) else _only_watches(guard)} Look at the data and the "
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
    if not held.settled:
        return f"Soft start, step {step}: updates at {scale}, growing while steps fall short."
    return (
        f"Holding updates at {scale} {_since(guard)}: the learning rate looks "
        f"{_plain(math.exp(-held.log_scale))} times too high."
    )


def _plain(x: float) -> str:
    """Two digits, without an exponent.

    >>> _plain(100.0), _plain(540.3), _plain(0.18), _plain(2.0)
    ('100', '540', '0.18', '2')
    """
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _tell(event: Event) -> str:
    if event.from_step is not None:
        return f"step {event.from_step}: back to {event.to_step} for {event.signal}"
    return (
        f"step {event.step}: {event.action} for {event.signal} = {event.value:.3g} "
        f"(threshold {event.threshold:.3g})"
    )


def _last_cause(guard: GuardState) -> str:
    return next(
        (CAUSES[e.signal] for e in reversed(events.read(guard.events)) if e.signal in CAUSES),
        "steps are rejected",
    )


def _since(guard: GuardState) -> str:
    cuts = [e.step for e in events.read(guard.events) if e.action == Action.CUT.name.lower()]
    return f"since step {cuts[-1]}" if cuts else "since the start"


def _acts(guard: GuardState) -> bool:
    """Whether its decisions are applied: not when it observes, nor before an optimizer."""
    return int(guard.mode) == Mode.GOVERN and guard.probe.parameters is None


def _only_watches(guard: GuardState) -> str:
    if int(guard.mode) == Mode.OBSERVE:
        return "It only observes: the optimizer's own updates were applied."
    return "It is chained before the optimizer: gradients that are not finite became zero, no more."

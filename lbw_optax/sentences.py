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
    held, step = guard.law.control, int(guard.guard_steps)
    scale = f"{100 * math.exp(held.log_scale):.2g} %"
    if held.exhausted:
        return exhausted(guard)
    if guard.law.divergence.rollback_asked:
        reason = ASKS[Reason(int(guard.law.divergence.rollback_asked))]
        return (
            f"Asking for a rollback at step {step}: {reason}. RollbackManager answers; without "
            "one, restore a checkpoint, or go on with lbw_optax.reset(state)."
        )
    if held.skips_in_a_row:
        return f"Skipping since step {step - int(held.skips_in_a_row)}: {_last_cause(guard)}."
    if held.pinned:
        end = 'lbw_optax.override(state, scale="auto")'
        return f"A person holds updates at {scale}; {end} gives them back."
    if held.log_scale >= math.log(control.FULL):
        return f"Nominal at step {step}: updates at {scale}, {int(held.skips)} steps skipped."
    if not held.settled:
        return f"Soft start, step {step}: updates at {scale}, growing while steps fall short."
    verb = "Holding" if _acts(guard) else "Would be holding"
    return (
        f"{verb} updates at {scale} {_since(guard)}: the learning rate looks "
        f"{math.exp(-held.log_scale):.2g} times too high."
    )


def exhausted(guard: GuardState) -> str:
    """Why a run is stopped, and what to do."""
    held = guard.law.control
    told = "; ".join(_tell(event) for event in events.read(guard.events)[-TOLD:])
    return (
        f"The guard is exhausted after {int(guard.guard_steps)} steps: {int(held.skips)} "
        f"skipped in all, {int(held.skips_in_a_row)} in a row, scale "
        f"{math.exp(held.log_scale):.3g}, regime {REGIMES[held.regime]}. Last interventions: "
        f"{told}. The parameters are as they were before the skipped steps. Look at the data and "
        "the learning rate, restore an earlier checkpoint, or go on with lbw_optax.reset(state), "
        "which clears this."
    )


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
    """Whether the scale is applied: not when it only observes, nor before an optimizer."""
    return int(guard.mode) == Mode.GOVERN and guard.probe.parameters.size == 0

"""The guard before an optimizer: it sees gradients, and keeps bad ones out.

Adam undoes a constant scale of its gradient, so a lasting scale is not applied here: a learning
rate that is too high stays too high. What Adam does not undo is a scale that differs from step to
step: a gradient that jumps is scaled back to the length that this run has shown. A gradient that is
not finite becomes zero; the optimizer's momentum and weight decay move the weights on a zero, too.
Telemetry, thresholds and law run as they do around an optimizer, and what a governing guard would
hold the scale at is reported.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lbw_optax import law
from lbw_optax import state as states
from lbw_optax.apply import either, scaled
from lbw_optax.law import events, telemetry
from lbw_optax.law.control import Action, Bounds, Decision, Signal
from lbw_optax.law.statistics import Statistics
from lbw_optax.law.telemetry import Probe, Telemetry
from lbw_optax.state import GuardState, Mode
from lbw_optax.types import Loss, PyTree


class ChainedGuard(optax.GradientTransformationExtraArgs):
    """A transformation of gradients that :func:`lbw_optax.chain` can make a governing guard."""

    bounds: Bounds
    mode: str


def watch(bounds: Bounds, mode: str) -> ChainedGuard:
    """The guard as a transformation of gradients."""

    def init_fn(params: PyTree) -> GuardState:
        nothing = telemetry.sample_of_zeros(params)
        here = nothing if telemetry.is_abstract(params) else telemetry.sample(params)
        probe = Probe(last_step=nothing, gradient=nothing, parameters=here)
        return states.init(params, probe, bounds, mode)._replace(inner_state=optax.EmptyState())

    def update_fn(
        updates: PyTree,
        state: GuardState,
        params: PyTree = None,
        *,
        value: Loss = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GuardState]:
        states.require(state)
        value, _ = telemetry.take_loss(value, extra_args)
        unmoved = jnp.asarray(state.probe.parameters)
        here = unmoved if params is None else telemetry.sample(params)
        probe = _moved(state.probe, here)
        seen, probe = telemetry.observe_gradients(state.telemetry, probe, updates, value)
        scale = jnp.exp(state.law.control.log_scale)
        seen = telemetry.observe_moved(seen, probe, here, scale)
        new_law, decision = law.step(state.law, seen, bounds)

        rejected = decision.skip
        decision, factor = _clip_jumps(decision, seen, state.law.statistics)
        governing = state.mode == Mode.GOVERN
        applied = scaled(updates, jnp.where(governing, factor, 1.0), governing & decision.skip)
        return applied, GuardState(
            inner_state=state.inner_state,
            guard_steps=optax.safe_increment(state.guard_steps),
            mode=state.mode,
            telemetry=seen,
            probe=either(rejected, telemetry.forget(probe), probe),
            law=new_law,
            events=events.record(state.events, state.guard_steps, decision, seen.loss),
        )

    guard = ChainedGuard(init_fn, update_fn)
    guard.bounds, guard.mode = bounds, mode
    return guard


def _moved(probe: Probe, here: jax.Array) -> Probe:
    """The probe with the step that has been taken since; one that is not finite is not kept."""
    finite, before = jnp.isfinite(here), jnp.asarray(probe.parameters)
    last_step = jnp.where(finite, here - before, 0.0)
    return probe._replace(last_step=last_step, parameters=jnp.where(finite, here, before))


def _clip_jumps(
    decision: Decision, seen: Telemetry, before: Statistics
) -> tuple[Decision, jax.Array]:
    """A finite gradient that jumps is not left out but limited, and by which factor."""
    shown = jnp.exp(before.gradient.mean)
    jumps = decision.skip & (decision.signal == Signal.GRADIENT_NORM)
    clips = jumps & seen.has_gradient & (shown > 0) & (shown < seen.gradient_norm)
    factor = jnp.where(clips, shown / seen.gradient_norm, 1.0)
    action = jnp.where(clips, jnp.int32(Action.CLIP), decision.action)
    return decision._replace(skip=decision.skip & ~clips, action=action), factor

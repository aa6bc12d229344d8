"""The guard before an optimizer: it sees gradients, and keeps bad ones out.

Adam undoes a constant scale of its gradient, so a lasting scale is not applied here: a learning
rate that is too high stays too high. What Adam does not undo is a scale that differs from step to
step: a gradient whose length or loss jumps is scaled back. A gradient that is
not finite becomes zero; the optimizer's momentum and weight decay move the weights on a zero, too.
Telemetry, thresholds and law run as they do around an optimizer, and what a governing guard would
hold the scale at is reported.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lbw_optax import law, parts
from lbw_optax import state as states
from lbw_optax.activations import Activations
from lbw_optax.apply import scaled
from lbw_optax.freeze import Freeze
from lbw_optax.law import classifier, control, events, layers, telemetry
from lbw_optax.law.control import Bounds
from lbw_optax.law.custom import Custom
from lbw_optax.law.telemetry import Probe
from lbw_optax.state import GuardState, Mode
from lbw_optax.types import Loss, PyTree


class ChainedGuard(optax.GradientTransformationExtraArgs):
    """A transformation of gradients that :func:`lbw_optax.chain` can make a governing guard."""

    bounds: Bounds
    mode: str
    freeze: Freeze | None
    custom: Custom | None
    adapts: bool


def watch(
    bounds: Bounds,
    mode: str,
    freeze: Freeze | None = None,
    custom: Custom | None = None,
    *,
    adapts: bool = False,
) -> ChainedGuard:
    """The guard as a transformation of gradients.

    `freeze` and `custom` are for `lbw_optax.chain`.
    """

    def init_fn(params: PyTree) -> GuardState:
        if freeze:
            raise ValueError(
                "groups needs a guard that governs the optimizer, for a layer stays as it is only "
                "where its moments do: write lbw_guard(optax.adamw(...), groups=...), or "
                "lbw_optax.chain instead of optax.chain."
            )
        if custom:
            raise ValueError(
                "signals, constraints and policy need a guard that governs the optimizer: write "
                "lbw_guard(optax.adamw(...), signals=...), or lbw_optax.chain instead of "
                "optax.chain."
            )
        nothing = telemetry.sample_of_zeros(params)
        here = nothing if telemetry.is_abstract(params) else telemetry.sample(params)
        probe = Probe(mean_parameters=nothing, parameters=here)
        own = states.init(probe, bounds, mode, adapts=adapts)
        return own._replace(inner_state=optax.EmptyState())

    def update_fn(
        updates: PyTree,
        state: GuardState,
        params: PyTree = None,
        *,
        value: Loss = None,
        activations: Activations | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GuardState]:
        states.require(state)
        state = states.as_arrays(state)
        value, _ = telemetry.take_loss(value, extra_args)
        parts.refuse(state, updates, params, value, activations)
        control_before = state.law.control
        seen, probe = telemetry.observe_gradients(
            state.telemetry, state.probe, updates, params, value, control_before.age
        )
        last_step, probe = _moved(probe, params)
        scale = jnp.exp(control_before.log_scale)
        seen = telemetry.observe_moved(seen, last_step, params, scale)
        arrival = control.arrive(seen, state.law.statistics)
        new_law, decision = law.step(state.law, seen, bounds)
        reported = classifier.reported(decision, state.law.classifier, new_law.classifier)

        governing = state.mode == Mode.GOVERN
        factor = jnp.exp(jnp.where(governing, arrival.log_factor, 0.0))
        return scaled(updates, factor, governing & decision.skip), GuardState(
            inner_state=state.inner_state,
            guard_steps=optax.safe_increment(state.guard_steps),
            mode=state.mode,
            telemetry=seen,
            probe=probe,
            law=new_law,
            events=events.record(state.events, state.guard_steps, reported, seen.loss),
            layers=layers.absorb(state.layers, activations),
        )

    guard = ChainedGuard(init_fn, update_fn)
    guard.bounds, guard.mode, guard.freeze, guard.custom = bounds, mode, freeze, custom
    guard.adapts = adapts
    return guard


def _moved(probe: Probe, params: PyTree) -> tuple[jax.Array, Probe]:
    """The step that has been taken since, probed; one that is not finite is not kept."""
    before = jnp.asarray(probe.parameters)
    here = before if params is None else telemetry.sample(params)
    finite = jnp.isfinite(here)
    return jnp.where(finite, here - before, 0.0), probe._replace(
        parameters=jnp.where(finite, here, before)
    )

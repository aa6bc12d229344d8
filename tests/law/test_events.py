"""The event ring against a plain list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same_bits

from lbw_optax.law import events as ring
from lbw_optax.law.control import Action, Decision, Regime, Signal
from lbw_optax.law.divergence import Reason
from lbw_optax.law.events import SIZE, Event

record = jax.jit(ring.record)
DONE = tuple(set(Action) - {Action.NONE, Action.ROLLBACK})


def random_step(rng, step, happens):
    """What the law may hand over in one step, and the event it amounts to."""
    action = rng.choice(DONE) if happens else Action.NONE
    signal, regime = Signal(rng.integers(1, len(Signal))), Regime(rng.integers(len(Regime)))
    value, threshold, before, after = (float(np.float32(x)) for x in rng.random(4))
    decision = Decision(
        skip=jnp.array(action == Action.SKIP),
        scale=jnp.float32(after),
        scale_before=jnp.float32(before),
        regime=jnp.int32(regime),
        action=jnp.int32(action),
        signal=jnp.int32(signal),
        value=jnp.float32(value),
        threshold=jnp.float32(threshold),
    )
    loss = float(np.float32(rng.random()))
    regime_name, signal_name, action_name = (
        x.name.lower() for x in (regime, signal, Action(action))
    )
    event = Event(0, step, regime_name, signal_name, value, threshold, action_name, before, after)
    return (jnp.int32(step), decision, jnp.float32(loss)), event._replace(loss=loss)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_ring_is_the_tail_of_the_list(share):
    rng, state, events = np.random.default_rng(11), ring.init(), []
    for step in range(int(2.5 * SIZE / max(share, 0.4))):  # round it more than twice
        happens = rng.random() < share
        given, event = random_step(rng, step, happens)
        before, state = state, record(state, *given)
        if happens:
            events.append(event._replace(number=len(events)))
        else:
            assert_same_bits(state, before)
        if step % 50 == 0:
            assert ring.read(state) == events[-SIZE:]
    assert ring.read(state) == events[-SIZE:]
    assert int(state.recorded) == len(events)


@pytest.mark.parametrize("step", [33, 2**24 + 1, 2**31 - 1])
def test_steps_of_a_rollback_come_back_as_they_went_in(step):
    """16,777,217 is no float32."""
    state = ring.record_rollback(
        ring.init(),
        jnp.int32(7),
        reason=jnp.int32(Reason.LOSS),
        from_step=jnp.int32(step),
        to_step=jnp.int32(step - 28),
        regime=jnp.int32(Regime.UNSTABLE),
        scale_before=jnp.float32(1),
        scale_after=jnp.float32(0.5),
        loss=jnp.float32(3),
    )
    expected = Event(0, 7, "unstable", "loss", None, None, "rollback", 1.0, 0.5, step, step - 28)
    expected = expected._replace(loss=3.0)
    assert ring.read(state) == [expected]

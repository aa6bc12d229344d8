"""The event ring against a plain list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same_bits

from lbw_optax.law import control
from lbw_optax.law import events as ring
from lbw_optax.law.control import ACTIONS, REGIMES, ROLLBACK, SIGNALS, Decision, Evidence
from lbw_optax.law.events import SIZE, Event

BOUNDS = control.Bounds(0.01, 30, 50)
record = jax.jit(ring.record)


def random_step(rng, step, happens):
    """What the law may hand over in one step, and the event it amounts to."""
    action = int(rng.integers(1, ROLLBACK)) if happens else 0
    signal, regime = int(rng.integers(1, len(SIGNALS))), int(rng.integers(len(REGIMES)))
    value, threshold, before, after = (float(np.float32(x)) for x in rng.random(4))
    state = control.init(BOUNDS)._replace(regime=jnp.int32(regime))
    evidence = Evidence(*[jnp.float32(0)] * len(Evidence._fields))._replace(
        signal=jnp.int32(signal), value=jnp.float32(value), threshold=jnp.float32(threshold)
    )
    decision = Decision(
        jnp.array(False), jnp.float32(after), jnp.float32(before), jnp.int32(action)
    )
    event = Event(
        0, step, REGIMES[regime], SIGNALS[signal], value, threshold, ACTIONS[action], before, after
    )
    return (jnp.int32(step), state, evidence, decision), event


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


def test_values_that_are_not_finite_are_kept_as_numbers():
    given, _ = random_step(np.random.default_rng(12), 0, True)
    evidence = given[2]._replace(value=jnp.float32(jnp.nan), threshold=jnp.float32(jnp.inf))
    event = ring.read(record(ring.init(), *given[:2], evidence, given[3]))[0]
    assert np.isfinite([event.value, event.threshold]).all()

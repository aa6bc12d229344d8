"""The law: against the NumPy reference over whole trajectories, and bounds for any input."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LawReference, Signals
from trajectories import (
    BOUNDS,
    TRAJECTORIES,
    batch,
    change,
    noisy,
    nothing_seen,
    run_law,
)

from lbw_optax import lbw_guard
from lbw_optax.law import control, statistics, telemetry
from lbw_optax.law.control import Action, Bounds, Control, Decision, Evidence, Regime, Signal

EPS = 1e-5
FLOOR = BOUNDS.min_scale


def first_log_scale(bounds=BOUNDS) -> float:
    return math.log(max(bounds.min_scale, control.FIRST_SCALE))


def names_of(kind, numbers) -> list[str]:
    return [kind(i).name.lower() for i in numbers]


@pytest.mark.parametrize("steps", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_trajectory_equals_the_reference(steps):
    state, decision = run_law(batch(steps))
    reference = LawReference(*BOUNDS)
    expected = [reference.step(step) for step in steps]
    actual = {
        "skip": decision.skip.tolist(),
        "action": names_of(Action, decision.action),
        "regime": names_of(Regime, state.regime),
        "signal": names_of(Signal, decision.signal),
        "exhausted": state.exhausted.tolist(),
        "calm_steps": state.calm_steps.tolist(),
        "skips_in_a_row": state.skips_in_a_row.tolist(),
        "skips": state.skips.tolist(),
        "age": state.age.tolist(),
    }
    for name, values in actual.items():
        assert values == [getattr(outcome, name) for outcome in expected], name
    applied = [outcome.log_applied for outcome in expected]
    np.testing.assert_allclose(np.log(decision.scale), applied, rtol=1e-3, atol=2e-3)
    for name in ("log_scale", "outstanding"):
        values = [getattr(outcome, name) for outcome in expected]
        np.testing.assert_allclose(getattr(state, name), values, rtol=1e-3, atol=2e-3, err_msg=name)
    for name in ("value", "threshold"):
        values = [getattr(outcome, name) for outcome in expected]
        np.testing.assert_allclose(getattr(decision, name), values, rtol=5e-3, atol=1e-3)
    before = np.append(first_log_scale(), state.log_scale[:-1])
    np.testing.assert_allclose(np.log(decision.scale_before), before, rtol=1e-4, atol=1e-5)


def test_the_trajectories_visit_every_regime_signal_and_action():
    """Or else the comparison above would prove less than it seems to."""
    seen = {"regime": set(), "signal": set(), "action": set()}
    for steps in TRAJECTORIES.values():
        _, decision = run_law(batch(steps))
        seen["regime"] |= set(names_of(Regime, decision.regime))
        seen["signal"] |= set(names_of(Signal, decision.signal))
        seen["action"] |= set(names_of(Action, decision.action))
    assert seen["regime"] == set(names_of(Regime, Regime))
    assert seen["signal"] == set(names_of(Signal, Signal)) - {"none"}
    assert seen["action"] == set(names_of(Action, Action)) - {"rollback"}  # which is the host's


# --- any float whatever ------------------------------------------------------------------------

ANY_FLOAT = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, 1e-45, 1e38, -1e38, math.inf, -math.inf, math.nan, 1.0]),
)
PROPERTY_LENGTH = 32
STEP_FIELDS = ("gradient_norm", "overshoot", "relative_step", "loss")


@st.composite
def any_telemetry(draw):
    """Any floats and any flags, whether or not telemetry would ever produce them."""
    seen = nothing_seen(PROPERTY_LENGTH)
    for name in STEP_FIELDS:
        pool = draw(st.lists(ANY_FLOAT, min_size=1, max_size=6))
        values = list(itertools.islice(itertools.cycle(pool), PROPERTY_LENGTH))
        getattr(seen, name)[:] = values
    for name in ("has_gradient", "has_step", "has_overshoot", "has_loss"):
        pattern = draw(st.integers(0, 2**PROPERTY_LENGTH - 1))
        getattr(seen, name)[:] = [bool(pattern >> i & 1) for i in range(PROPERTY_LENGTH)]
    for name in ("nonfinite_gradients", "nonfinite_loss", "nonfinite_updates"):
        at = draw(st.lists(st.integers(0, PROPERTY_LENGTH - 1), max_size=4))
        getattr(seen, name)[at] = draw(st.integers(1, 2**31 - 1))
    return seen


def assert_bounded(state: Control, decision: Decision, floor: float) -> None:
    """The soft start sets the scale, once; from then on, and before, it moves in bounds."""
    chex.assert_tree_all_finite(jax.tree.map(jnp.asarray, (state, decision)))
    assert (decision.scale >= floor * (1 - EPS)).all()
    assert (decision.scale <= 1).all()
    moved = np.diff(state.log_scale, prepend=first_log_scale(BOUNDS._replace(min_scale=floor)))
    governed = np.diff(state.started.astype(int), prepend=0) == 0
    assert (~governed).sum() <= 1
    assert (np.abs(moved[governed]) <= control.MOST + EPS).all()
    assert (np.log(decision.scale) <= state.log_scale + EPS)[governed].all()
    assert ((state.age >= 0) & (state.age <= 1 + np.arange(len(state.age)))).all()
    assert ((state.outstanding >= 0) & (state.outstanding <= BOUNDS.max_interventions)).all()
    assert ((state.regime >= 0) & (state.regime < len(Regime))).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_telemetry(), st.sampled_from([1.0, 0.5, 0.01, 1e-6]))
def test_any_floats_leave_the_law_in_bounds(seen, floor):
    bounds = BOUNDS._replace(min_scale=floor)
    state, decision = run_law(seen, bounds)
    assert_bounded(state, decision, floor)
    assert ((decision.signal > 0) & (decision.signal < len(Signal))).all()
    # Once exhausted, for ever; and every rejected step is skipped, exhausted or not.
    assert (np.diff(state.exhausted.astype(int)) >= 0).all()
    np.testing.assert_array_equal(decision.skip, decision.action == Action.SKIP)
    nonfinite = seen.nonfinite_gradients + seen.nonfinite_loss + seen.nonfinite_updates
    assert decision.skip[nonfinite > 0].all()


@jax.jit
def _decide_all(evidence: Evidence, bounds: Bounds):
    def step(state, one):
        state, decision = control.decide(state, one, bounds)
        return state, (state, decision)

    return jax.lax.scan(step, control.init(bounds), evidence)[1]


def quiet_evidence() -> Evidence:
    """Nothing seen: as the law makes it of telemetry before the first step."""
    seen, nothing = telemetry.init(), statistics.init()
    no = jnp.array(False)
    arrival = control.Arrival(jnp.int32(0), no, no, no, jnp.float32(0))
    start = control.init(BOUNDS)
    return control.judge(start, seen, nothing, nothing, arrival, control.RULES)


_quiet = jax.jit(quiet_evidence)


def decide_all(bounds=BOUNDS, **given_evidence) -> tuple[Control, Decision]:
    """`decide` on hand-made evidence; what is not given is quiet."""
    length = max(len(np.atleast_1d(x)) for x in given_evidence.values())
    quiet = jax.tree.map(lambda x: np.full(length, x, x.dtype), jax.device_get(_quiet()))
    given = {name: np.asarray(x, getattr(quiet, name).dtype) for name, x in given_evidence.items()}
    return jax.device_get(_decide_all(quiet._replace(**given), bounds))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(ANY_FLOAT, min_size=PROPERTY_LENGTH, max_size=PROPERTY_LENGTH),
    st.lists(st.integers(0, 9), min_size=PROPERTY_LENGTH, max_size=PROPERTY_LENGTH),
)
def test_any_alarm_leaves_the_decision_in_bounds(alarms, kinds):
    rejected = [int(Signal.NONFINITE_GRADIENTS) if kind == 0 else 0 for kind in kinds]
    spike = [kind == 1 for kind in kinds]
    state, decision = decide_all(alarm=alarms, rejected=rejected, spike=spike)
    assert_bounded(state, decision, FLOOR)
    unmoved = decision.skip | np.isnan(np.asarray(alarms, np.float32))
    np.testing.assert_array_equal(decision.scale[unmoved], decision.scale_before[unmoved])


# --- soft start, regimes, cool-down, budget -----------------------------------------------------

DEEP, CALM = 1.0, -1.0  # alarms that ask for the largest cut and the largest growth


def regimes(state: Control) -> list[str]:
    return names_of(Regime, state.regime)


@pytest.mark.parametrize("r", [1e-30, 1e-6, 1e-3, 0.02, 30.0])
def test_soft_start_sets_the_first_measured_step(r):
    """The third step is the first that is measured: it is scaled to the length of a first step."""
    steps = [Signals(), Signals(loss=3.0), *[Signals(relative_step=r)] * 3]
    state, decision = run_law(batch(steps))
    np.testing.assert_allclose(np.log(decision.scale[:2]), first_log_scale(), rtol=1e-5)
    wanted = math.exp(first_log_scale()) * control.FIRST_STEP / r
    np.testing.assert_allclose(decision.scale[2], np.clip(wanted, FLOOR, 1), rtol=1e-4)
    assert state.started.tolist() == [False, False, True, True, True]
    assert decision.action[2] == 0  # setting a scale is no intervention


def test_a_skipped_step_does_not_start():
    bad = Signals(relative_step=0.5, nonfinite_gradients=1)
    state, decision = run_law(batch([bad, Signals(relative_step=2e-3)]))
    assert state.started.tolist() == [False, True]
    assert decision.scale[0] == decision.scale_before[0]


def test_no_step_is_above_the_ceiling():
    """0.0015 sqrt(t); what lasts of a cut is at most 0.4 a step."""
    steps = [Signals(relative_step=1e-4)] * 4 + [Signals(relative_step=0.1)] * 2
    state, decision = run_law(batch(steps))
    before = decision.scale_before[4:]
    np.testing.assert_allclose(decision.scale[4:] / before, 0.015 * np.sqrt([5, 6]), rtol=1e-4)
    np.testing.assert_allclose(np.diff(state.log_scale)[3:], -control.MOST, rtol=1e-4)


@pytest.mark.parametrize(
    ("long", "in_wake", "anew"),
    [(1, False, False), (2, False, False), (3, False, True), (10, True, False), (11, True, True)],
)
def test_steps_that_jump_are_limited_and_after_three_the_law_begins_anew(long, in_wake, anew):
    """To twice the longest of late, as after a jump of the rate; one alone changes nothing.

    In the wake of a gradient that jumped, ten steps, it takes ten more of them.
    """
    usual = [Signals(relative_step=0.002, overshoot=-0.1)] * 40
    r = 0.008 if in_wake else 0.2  # under the ceiling, which cuts what lasts at any time
    jump = [Signals(relative_step=r, overshoot=-0.1) for _ in range(long)]
    jump[0].gradient_norm = 1e3 if in_wake else usual[0].gradient_norm
    state, decision = run_law(batch(usual + jump + usual[:1]))
    taken = r * decision.scale[40] / decision.scale_before[40]
    np.testing.assert_allclose(taken, 2 * 0.002, rtol=0.02)
    assert (state.age[40 + long - 1] == 0) == anew
    assert state.age[39] == 40
    lasts = state.log_scale[40 : 40 + min(long, control.COOL_DOWN)] - state.log_scale[39]
    moved = 0.0 if in_wake else -control.MOST
    np.testing.assert_allclose(lasts, moved * np.arange(1, len(lasts) + 1), rtol=1e-4)


@pytest.mark.parametrize(
    ("factor", "long", "scale", "anew"),
    [(0.2, 3, 0.5, True), (0.2, 2, 0.5, False), (0.3, 3, 0.5, False), (0.2, 3, 1.0, False)],
    ids=["a fall", "too few", "too small", "at the full rate"],
)
def test_three_steps_far_shorter_than_of_late_begin_the_law_anew_unless_the_scale_is_full(
    factor, long, scale, anew
):
    state = control.init(BOUNDS)._replace(
        pinned=jnp.array(True), log_scale=jnp.log(jnp.float32(scale)), started=jnp.array(True)
    )
    decide = jax.jit(control.decide)
    for step in [0.001] * 40 + [0.001 * factor] * long:
        log_step = jnp.log(jnp.float32(step))
        stepped = _quiet()._replace(log_step=log_step, has_step=jnp.array(True))
        state, _ = decide(state, stepped, BOUNDS)
    assert int(state.age) == (0 if anew else 40 + long)


def test_growth_is_quick_until_the_first_alarm():
    alarms = [0.0, 0.0, 0.0, -0.5, 0.3, -0.5, 0.3]
    state, _ = decide_all(alarm=alarms)
    moved = np.diff(state.log_scale)[2:]
    expected = [0.5 * control.MOST, -0.3 * 1.5 / 5, 0.5 * 2 / 6, -0.3 * 1.5 / 7]
    np.testing.assert_allclose(moved, expected, rtol=1e-4)
    assert state.settled.tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize("age", [10, 100, 1000])
def test_growth_and_cut_are_power_laws_of_the_age(age):
    start = control.init(BOUNDS)._replace(age=jnp.int32(age - 1), settled=jnp.array(True))
    for alarm, power in ((-1.0, control.GROWTH), (1.0, -control.CUT)):
        quiet = _quiet()._replace(alarm=jnp.float32(alarm))
        state, _ = jax.jit(control.decide)(start, quiet, BOUNDS)
        moved = state.log_scale - start.log_scale
        np.testing.assert_allclose(moved, np.clip(power / age, -0.4, 0.4), rtol=1e-3)


@pytest.mark.parametrize(("stds", "cut"), [(0.5, False), (2.9, False), (3.5, True)])
def test_the_full_rate_is_cut_for_a_significant_reason_only(stds, cut):
    full = control.init(BOUNDS)._replace(log_scale=jnp.float32(0))
    alarm = control.alarm(control._without_doubt(full, jnp.float32(stds)))
    assert bool(alarm > 0) == cut
    below = control.alarm(control._without_doubt(control.init(BOUNDS), jnp.float32(stds)))
    assert bool(below > 0) == (stds > 1)


def test_growth_without_a_measured_step():
    """From the first scale upwards, by at most the growth of one step, to exactly 1."""
    state, decision = decide_all(alarm=[CALM] * 100)
    np.testing.assert_allclose(decision.scale_before[0], math.exp(first_log_scale()), rtol=1e-5)
    steps = math.ceil(-first_log_scale() / control.MOST)
    assert decision.scale[steps - 2] < 1
    assert (decision.scale[steps:] == 1).all()
    assert regimes(state)[0] == "recovering"
    assert regimes(state)[-1] == "nominal"
    assert not decision.action.any()  # a start is no intervention


def test_a_cut_is_reported_once_and_a_recovery_once():
    """Fifty steps up, ten down, ninety up again."""
    state, decision = decide_all(alarm=[CALM] * 50 + [DEEP] * 10 + [CALM] * 90)
    assert [r for r, _ in itertools.groupby(regimes(state))] == [
        "recovering", "nominal", "stressed", "recovering", "nominal",
    ]  # fmt: skip
    actions = names_of(Action, decision.action[decision.action > 0])
    assert actions == ["cut", "recover"]


def test_hysteresis():
    """Wavering by less than the turn changes no regime, however often."""
    settle = [CALM] * 60
    up, down = -1 / control.GROWTH, 1 / control.CUT
    state, decision = decide_all(alarm=settle + [down, up] * 100)
    assert set(regimes(state)[60:]) == {"nominal"}
    assert not decision.action[60:].any()


@pytest.mark.parametrize("trouble", ["spike", "rejected"])
def test_cool_down(trouble):
    """After trouble: unstable, no growth for the cool-down, then recovering and growing again."""
    length, at = 60, 5
    happened = np.zeros(length, np.int32)
    happened[at] = 1
    limited = happened if trouble == "spike" else 0 * happened
    state, decision = decide_all(alarm=[CALM] * length, limited=limited, **{trouble: happened})
    calm_again = at + control.COOL_DOWN
    assert set(regimes(state)[at:calm_again]) == {"unstable"}
    assert regimes(state)[calm_again] == "recovering"
    assert (decision.scale[at:calm_again] == decision.scale[at - 1]).all()
    assert decision.scale[calm_again] > decision.scale[at]
    first = "skip" if trouble == "rejected" else "clip"
    assert names_of(Action, decision.action[at:]) == [
        first, *["none"] * (control.COOL_DOWN - 1), "recover", *["none"] * (length - calm_again - 1)
    ]  # fmt: skip


def test_an_unstable_run_may_still_be_cut():
    spike = np.arange(40) == 25
    alarm = np.where(np.arange(40) > 25, DEEP, CALM)
    _, decision = decide_all(alarm=alarm, spike=spike)
    assert decision.scale[26] < decision.scale[25]


def test_budget_is_spent_and_earned():
    """One intervention costs one; calm steps earn it back, and no more than that."""
    rejected = np.zeros(100, np.int32)
    rejected[[10, 11, 12]] = 4
    state, _ = decide_all(rejected=rejected)
    np.testing.assert_allclose(state.outstanding[[9, 10, 11, 12]], [0, 1, 2, 3])
    np.testing.assert_allclose(state.outstanding[13], 3 - control.EARNED, rtol=1e-6)
    assert state.outstanding[12 + math.ceil(3 / control.EARNED) + 1] == 0
    assert state.outstanding.min() == 0
    assert not state.exhausted.any()


def test_exhausted_by_skips_in_a_row_latches_and_skips_go_on():
    bounds = BOUNDS._replace(max_skips=5)
    rejected = np.array([4] * 4 + [0] + [4] * 8 + [0] * 40)
    state, decision = decide_all(bounds, rejected=rejected)
    assert state.exhausted.argmax() == 9  # four in a row are not five
    assert state.exhausted[9:].all()
    np.testing.assert_array_equal(decision.skip, rejected > 0)
    assert state.skips[-1] == 12


def test_exhausted_by_the_budget():
    """Skips that are never in a row, but too many."""
    bounds = BOUNDS._replace(max_interventions=3)
    state, _ = decide_all(bounds, rejected=[4, 0] * 10)
    # Spends 1, earns 0.1: 0.9, 1.8, 2.7 outstanding, and the fourth is one too many.
    assert state.exhausted.argmax() == 6
    assert state.exhausted[6:].all()


def test_cuts_alone_exhaust_nothing():
    """Two batches in turn, without noise: steps of two lengths, and a cut at every other one."""
    tx = lbw_guard(optax.sgd(0.1), max_interventions=5)

    def step(carry, i):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.sum((p - i % 2) ** 2))(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), state.law.control

    start = jnp.ones(3)
    _, control = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(400))
    assert control.outstanding.max() > 4  # it is at its end, and the run goes on
    assert not control.skips[-1]
    assert not control.exhausted.any()


def test_pinned_scale_holds():
    state = control.init(BOUNDS)._replace(pinned=jnp.array(True), log_scale=jnp.float32(-1.0))
    step = jax.jit(control.decide)
    for alarm in (DEEP, CALM, math.nan):
        quiet = _quiet()._replace(alarm=jnp.float32(alarm), has_step=jnp.array(True))
        state, decision = step(state, quiet, BOUNDS)
        assert state.log_scale == -1.0
        assert decision.scale == decision.scale_before


# --- thresholds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("climb", [False, True], ids=["jump", "climb"])
def test_a_jump_is_limited_and_a_climb_to_the_same_norm_is_not(climb):
    quiet = np.full(100, 1.0)
    steady = np.geomspace(1.0, 1000.0, 101)[:-1]
    norms = np.append(steady if climb else quiet, 1000.0)
    _, decision = run_law(batch([Signals(gradient_norm=x) for x in norms]))
    assert (decision.action[-1] == Action.CLIP) == (not climb)
    assert (decision.action[:-1] != Action.CLIP).all()
    assert not decision.skip.any()
    assert Signal(decision.signal[-1]).name.lower() == ("overshoot" if climb else "gradient_norm")


def test_less_than_the_spike_factor_is_never_limited():
    """However quiet the run was, up to ten times the usual norm passes."""
    for factor, limited in ((0.95, False), (1.05, True)):
        norms = [1.0] * 200 + [factor * statistics.SPIKE_FACTOR]
        _, decision = run_law(batch([Signals(gradient_norm=x) for x in norms]))
        assert (decision.action[-1] == Action.CLIP) == limited


def _arrivals(norms) -> list[float]:
    """What the optimizer would be given of gradients of these lengths."""
    remembered, given = statistics.init(), []
    for norm in norms:
        seen = telemetry.init()._replace(
            gradient_norm=jnp.float32(norm), has_gradient=jnp.array(True)
        )
        arrival = control.arrive(seen, remembered)
        given.append(norm * math.exp(float(arrival.log_factor)))
        no = jnp.array(False)
        remembered = statistics.absorb(
            remembered, seen, arrival.jumps, arrival.log_factor, no, jnp.int32(1)
        )
    return given


@pytest.mark.parametrize("factor", [20, 1e3, 1e12])
def test_a_gradient_that_jumps_is_scaled_back_to_what_the_run_has_shown(factor):
    """Also the next ones of the same row: a fault may last."""
    usual = np.random.default_rng(0).lognormal(0, 0.3, 60)
    given = _arrivals([*usual, factor, factor])
    np.testing.assert_allclose(given[:60], usual, rtol=1e-5)
    np.testing.assert_allclose(given[60:], 1.0, rtol=0.6)


def test_jumps_that_come_again_are_let_through():
    """As from a source of data that is rare: up to the longest so far, which grows by a fifth."""
    norms = np.full(400, 1.0)
    norms[0], norms[60::40] = 300.0, 500.0
    grown = np.minimum(300.0 * statistics.AGAIN ** np.arange(1, 9), 500.0)
    np.testing.assert_allclose(_arrivals(norms)[60::40], [1.0, *grown], rtol=0.2)


def test_the_gradient_of_a_loss_that_jumps_is_scaled_to_a_tenth():
    """In its first row; after that it is the data's."""
    steps = change(noisy(), [*range(100, 103), *range(200, 203)], loss=60.0)
    _, decision = run_law(batch(steps))
    told = [names_of(Action, decision.action[i : i + 3]) for i in (100, 200)]
    assert told == [["clip"] * 3, ["none"] * 3]
    seen, remembered = batch(steps), statistics.init()
    remembered = remembered._replace(
        loss=statistics.Running(jnp.float32(1), jnp.float32(0), jnp.float32(1)),
        loss_unit=jnp.float32(5),
    )
    arrival = control.arrive(jax.tree.map(lambda x: jnp.asarray(x[100]), seen), remembered)
    np.testing.assert_allclose(np.exp(arrival.log_factor), 0.1, rtol=1e-5)


@pytest.mark.parametrize("every", [2, 6, 8, 10])
def test_a_second_source_in_turn_does_not_hold_the_scale(every):
    """Its losses are far above the others': spikes, the first of which alone is unexpected."""
    alone, _ = run_law(batch(change(noisy(), range(400), overshoot=-0.3)))
    steps = change(noisy(), range(400), overshoot=-0.3)
    state, decision = run_law(batch(change(steps, range(20, 400, every), loss=60.0)))
    assert alone.log_scale[-1] == state.log_scale[-1] == 0
    grown = [np.argmax(x.log_scale > -0.1) for x in (alone, state)]
    assert grown[1] - grown[0] <= 3 * control.COOL_DOWN
    assert names_of(Action, decision.action).count("clip") == 1


def test_first_step_is_judged_by_nothing():
    """No threshold before anything was seen; non-finite values are refused all the same."""
    for first, skipped in ((1e30, False), (None, True)):
        _, decision = run_law(batch([Signals(gradient_norm=first, loss=1e30)]))
        assert decision.skip[0] == skipped


# --- what is reported, and changes nothing -------------------------------------------------------


def _reports(steps: list[Signals], action: Action) -> list[int]:
    return np.flatnonzero(run_law(batch(steps))[1].action == action).tolist()


def test_a_low_scale_at_rest_is_reported_once():
    """Where the soft start has put it, and the rate that it amounts to."""
    steps = change(noisy(), range(400), relative_step=control.FIRST_STEP, overshoot=None)
    (at,) = _reports(steps, Action.HELD)
    state, decision = run_law(batch(steps))
    assert at <= 2 * control.REST_STEPS
    assert decision.scale[at] == pytest.approx(control.FIRST_SCALE, rel=1e-4)
    assert state.rest.steps[-1] > 300


@pytest.mark.parametrize("name", ["healthy", "gradient_spikes", "loss_spikes"])
def test_a_few_rejected_steps_are_not_reported(name):
    assert _reports(TRAJECTORIES[name], Action.REJECTING) == []


@pytest.mark.parametrize(("every", "reported"), [(10, True), (30, False)])
def test_a_large_share_of_rejected_steps_is_reported_once(every, reported):
    steps = change(noisy(), range(0, 400, every), nonfinite_gradients=1, gradient_norm=None)
    state, decision = run_law(batch(steps))
    at = _reports(steps, Action.REJECTING)
    assert at == ([control.REJECTED_FROM - 1] if reported else [])
    np.testing.assert_allclose(state.rejections.share[-1], 1 / every, atol=3e-3)
    for i in at:
        assert decision.signal[i] == Signal.NONFINITE_GRADIENTS
        assert decision.value[i] == pytest.approx(1 / every, abs=3e-3)

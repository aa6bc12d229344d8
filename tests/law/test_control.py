"""The law: against the NumPy reference over whole trajectories, and bounds for any input."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
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
    }
    for name, values in actual.items():
        assert values == [getattr(outcome, name) for outcome in expected], name
    for name in ("log_scale", "outstanding"):
        values = [getattr(outcome, name) for outcome in expected]
        np.testing.assert_allclose(getattr(state, name), values, rtol=1e-3, atol=2e-3, err_msg=name)
    for name in ("value", "threshold"):
        values = [getattr(outcome, name) for outcome in expected]
        np.testing.assert_allclose(getattr(decision, name), values, rtol=5e-3, atol=1e-3)
    np.testing.assert_allclose(np.log(decision.scale), state.log_scale, rtol=1e-4, atol=1e-5)
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
    # A rollback is the host's, a clipped gradient that of the chained placement.
    assert seen["action"] == set(names_of(Action, Action)) - {"rollback", "clip"}


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
    assert (moved[governed] >= -math.log(control.AT_ONCE) - EPS).all()
    assert (moved[governed] <= control.MOST_GROWTH + EPS).all()
    assert (decision.scale >= 0.1 * (1 - EPS) * decision.scale_before)[governed].all()
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
    seen, nothing = telemetry.init(None), statistics.init()
    return control.judge(control.init(BOUNDS), seen, nothing, nothing, jnp.int32(0), control.alarm)


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
    rejected = [4 if kind == 0 else 0 for kind in kinds]
    spike = [kind == 1 for kind in kinds]
    state, decision = decide_all(alarm=alarms, rejected=rejected, spike=spike)
    assert_bounded(state, decision, FLOOR)
    unmoved = decision.skip | np.isnan(np.asarray(alarms, np.float32))
    np.testing.assert_array_equal(decision.scale[unmoved], decision.scale_before[unmoved])


# --- soft start, regimes, cool-down, budget -----------------------------------------------------

DEEP, CALM = 1e6, -1e6  # alarms that ask for the largest cut and the largest growth


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


@pytest.mark.parametrize(("r", "factor"), [(0.029, None), (0.09, 1 / 3), (0.3, 0.1), (30.0, 0.1)])
def test_a_step_far_above_kappa_is_cut_at_once(r, factor):
    """A learning rate that jumps: to three times kappa, by a tenth at most; below, MOST_CUT."""
    steps = [Signals(relative_step=0.001)] * 30 + [Signals(relative_step=r)]
    _, decision = run_law(batch(steps))
    found = decision.scale[-1] / decision.scale_before[-1]
    if factor is None:
        assert math.exp(-control.MOST_CUT) <= found < 1
    else:
        np.testing.assert_allclose(found, factor, rtol=1e-4)


def test_growth_is_quick_until_the_first_alarm():
    """The same wish to grow, at kappa / e^2: three times the gain before an alarm, once after."""
    far = {"has_step": True, "log_step": -2.0}
    wish = -0.2 * control.GROWTH / control.GAIN
    state, _ = decide_all(
        alarm=[0.0, wish, wish, 1.1, wish], **{k: [v] * 5 for k, v in far.items()}
    )
    moved = np.diff(state.log_scale)
    np.testing.assert_allclose(moved[:2], 0.2 * control.GROWTH * (1 + control.QUICK), rtol=1e-4)
    np.testing.assert_allclose(moved[3], 0.2 * control.GROWTH, rtol=1e-3)
    assert state.settled.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("overshoot", "share_of_kappa", "cut"),
    [(0.01, 0.1, False), (0.5, 0.1, True), (0.01, 1.4, False), (0.01, 1.7, True)],
)
def test_the_full_rate_is_cut_for_a_significant_reason_only(overshoot, share_of_kappa, cut):
    """At scale 1: about one standard error of overshoot holds, fifty cut; 1.5 kappa divides."""
    steps = [Signals(relative_step=1e-4, overshoot=-0.5)] * 30
    large = Signals(relative_step=share_of_kappa * control.KAPPA, overshoot=overshoot, loss=3.0)
    state, _ = run_law(batch(steps + [large] * 60))
    assert state.log_scale[29] == 0
    assert (state.log_scale[-1] < math.log(control.FULL)) == cut


def test_growth_without_a_measured_step():
    """From the first scale upwards, by at most the growth of one step, to exactly 1."""
    state, decision = decide_all(alarm=[CALM] * 100)
    np.testing.assert_allclose(decision.scale_before[0], math.exp(first_log_scale()), rtol=1e-5)
    steps = math.ceil(-first_log_scale() / control.GROWTH)
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
    small = 0.4 * -math.log(control.TURN) / control.GAIN
    state, decision = decide_all(alarm=settle + [small, -small] * 100)
    assert set(regimes(state)[60:]) == {"nominal"}
    assert not decision.action[60:].any()


@pytest.mark.parametrize("trouble", ["spike", "rejected"])
def test_cool_down(trouble):
    """After trouble: unstable, no growth for the cool-down, then recovering and growing again."""
    length, at = 60, 20
    happened = np.zeros(length, np.int32)
    happened[at] = 1
    state, decision = decide_all(alarm=[CALM] * length, **{trouble: happened})
    calm_again = at + control.COOL_DOWN
    assert set(regimes(state)[at:calm_again]) == {"unstable"}
    assert regimes(state)[calm_again] == "recovering"
    assert (decision.scale[at:calm_again] == decision.scale[at - 1]).all()
    assert decision.scale[calm_again] > decision.scale[at]
    first = "skip" if trouble == "rejected" else "hold"
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
def test_a_jump_is_skipped_and_a_climb_to_the_same_norm_is_not(climb):
    quiet = np.full(100, 1.0)
    steady = np.geomspace(1.0, 1000.0, 101)[:-1]
    norms = np.append(steady if climb else quiet, 1000.0)
    _, decision = run_law(batch([Signals(gradient_norm=x) for x in norms]))
    assert decision.skip[-1] == (not climb)
    assert not decision.skip[:-1].any()
    assert Signal(decision.signal[-1]).name.lower() == ("overshoot" if climb else "gradient_norm")


def test_less_than_the_spike_factor_is_never_skipped():
    """However quiet the run was, up to ten times the usual norm passes."""
    for factor, skipped in ((0.95, False), (1.05, True)):
        norms = [1.0] * 200 + [factor * control.SPIKE_FACTOR]
        _, decision = run_law(batch([Signals(gradient_norm=x) for x in norms]))
        assert decision.skip[-1] == skipped


def test_first_step_is_judged_by_nothing():
    """No threshold before anything was seen; non-finite values are refused all the same."""
    for first, skipped in ((1e30, False), (None, True)):
        _, decision = run_law(batch([Signals(gradient_norm=first, loss=1e30)]))
        assert decision.skip[0] == skipped


# --- what is reported, and changes nothing -------------------------------------------------------


def _reports(steps: list[Signals], action: Action) -> list[int]:
    return np.flatnonzero(run_law(batch(steps))[1].action == action).tolist()


def test_a_low_scale_at_rest_is_reported_once():
    """Steps that are too long for good, and the rate that they amount to."""
    steps = change(noisy(), range(400), relative_step=control.KAPPA, overshoot=0.0)
    (at,) = _reports(steps, Action.HELD)
    state, decision = run_law(batch(steps))
    assert at <= 2 * control.REST_STEPS
    assert decision.scale[at] == pytest.approx(control.FIRST_SCALE * 0.1, rel=0.3)
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

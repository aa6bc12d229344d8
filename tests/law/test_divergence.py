"""When the guard asks for a rollback: against the NumPy reference, and rule by rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import LawReference, Signals
from trajectories import BOUNDS, DIVERGING, batch, change, falling, noisy, risen, scan

from lbw_optax.law import divergence, statistics
from lbw_optax.law.divergence import Divergence, Reason

BAD_GRADIENT = {"nonfinite_gradients": 3, "gradient_norm": None}


def assess(steps: list[Signals]) -> Divergence:
    return jax.device_get(scan(batch(steps), BOUNDS)[0].divergence)


def name_of(reason: int) -> str:
    return Reason(reason).name.lower()


def asked_at(steps: list[Signals]) -> tuple[str, int | None]:
    """The reason, and the first step that asks."""
    asked = assess(steps).rollback_asked
    first = int(np.argmax(asked > 0)) if asked.any() else None
    return name_of(asked[-1]), first


@pytest.mark.parametrize("steps", DIVERGING.values(), ids=DIVERGING)
def test_trajectory_equals_the_reference(steps):
    state, reference = assess(steps), LawReference(*BOUNDS)
    expected = [reference.step(step) for step in steps]
    asked = [name_of(i) for i in state.rollback_asked]
    assert asked == [outcome.rollback_asked for outcome in expected]
    excess = [outcome.loss_excess for outcome in expected]
    np.testing.assert_allclose(state.loss_excess, excess, rtol=1e-3, atol=5e-3)


def test_every_reason_occurs():
    """Or else the comparison above would prove less than it seems to."""
    reasons = {asked_at(steps)[0] for steps in DIVERGING.values()}
    assert reasons == {name_of(reason) for reason in Reason} - {"request"}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_never_asks(seed):
    assert asked_at(noisy(length=400, seed=seed)) == ("none", None)


@pytest.mark.parametrize(
    ("steps", "reason", "after"),
    [
        (DIVERGING["corrupt_parameters"], "parameters", 0),
        (change(noisy(), range(150, 400), updates_broken=True), "inner_state", 1),
        (change(noisy(), range(150, 400), nonfinite_updates=1), "inner_state", 1),
        (change(noisy(), range(150, 400), **BAD_GRADIENT), "skips", 19),
        (change(noisy(), range(150, 400), nonfinite_loss=1, loss=None), "skips", 19),
        (change(noisy(), range(150, 400), gradient_norm=None), "skips", 19),
        (risen(30.0, start=150), "loss", 3),
        (risen(0.8, start=150), "loss", 4),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_how_soon_each_reason_asks(steps, reason, after):
    assert asked_at(steps) == (reason, 150 + after)


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_that_rises_out_of_a_steep_fall_asks_as_soon(seed):
    """By a standard deviation that holds the trend too, no rise of this size would stand out."""
    steps = falling(2.0, start=60, seed=seed)
    reason, at = asked_at(steps)
    assert reason == "loss"
    assert 62 < at <= 69
    assert asked_at(falling(0.0, start=60, seed=seed)) == ("none", None)


def _ordered(correlation: float, seed: int, length=1000) -> list[Signals]:
    """A loss that falls, with noise as of text that is read in its order, 0.3 nats wide."""
    rng, noise, steps = np.random.default_rng(seed), 0.0, []
    for i in range(length):
        fresh = math.sqrt(1 - correlation**2) * rng.standard_normal()
        noise = correlation * noise + fresh
        steps.append(Signals(loss=float(np.float32(3 + 1.5 * math.exp(-i / 150) + 0.3 * noise))))
    return steps


@pytest.mark.parametrize("seed", [0, 1, 4, 7, 8, 17, 19])
def test_text_in_its_order_does_not_ask_and_a_rise_in_it_does(seed):
    """By the standard deviation of the innovation alone each of these would ask."""
    steps = _ordered(0.75, seed)
    assert asked_at(steps) == ("none", None)
    for step in steps[800:]:
        step.loss += 3.0
    reason, at = asked_at(steps)
    assert reason == "loss"
    assert 800 < at < 860


def test_the_autocorrelation_is_that_of_neighbours():
    """Of independent noise it is nearly none, and of correlated noise what NumPy says."""
    for correlation in (0.0, 0.75):
        steps = _ordered(correlation, seed=0, length=3000)
        states = assess(steps)
        y = np.log1p([step.loss for step in steps])
        innovation = (y[1:] - states.level.mean[:-1])[300:]
        expected = np.corrcoef(innovation[:-1], innovation[1:])[0, 1]
        assert states.autocorrelation[300:].mean() == pytest.approx(expected, abs=0.1)


def test_after_a_rollback_the_autocorrelation_stays_known():
    state = divergence.init()._replace(autocorrelation=np.float32(0.5), loss_excess=np.float32(3))
    again = divergence.after_rollback(state)
    assert again == divergence.init()._replace(
        autocorrelation=state.autocorrelation,
        grace=again.grace,
        first_gradients=again.first_gradients,
    )
    assert again.first_gradients.seen == divergence.FIRST_STEPS + divergence.NEXT_STEPS
    assert again.grace == divergence.GRACE


@pytest.mark.parametrize(
    ("at", "norm", "asks"),
    [([0], 1e3, 9), ([0], 50.0, None), ([0, 1], 1e3, 9), ([0, 1, 2], 1e3, None), ([1], 1e-3, None)],
)
def test_a_broken_first_gradient_is_known_by_the_next(at, norm, asks):
    """Longer by a hundred than the longest of the eight that follow the first two."""
    steps = [Signals(gradient_norm=1.0) for _ in range(20)]
    reason = "none" if asks is None else "inner_state"
    assert asked_at(change(steps, at, gradient_norm=norm)) == (reason, asks)


@pytest.mark.parametrize(("sigma", "most"), [(1.5, 0), (2.0, 1), (3.0, 8)])
def test_heavy_tailed_first_gradients_hardly_ever_ask(sigma, most):
    """Of 400 runs; by one shorter gradient alone 7, 31 and 88 of them would."""
    norms = np.random.default_rng(0).lognormal(0, sigma, (400, 12))
    runs = [[Signals(gradient_norm=float(np.float32(x))) for x in row] for row in norms]
    assert sum(asked_at(steps)[0] == "inner_state" for steps in runs) <= most


@pytest.mark.parametrize(
    "steps",
    [
        change(noisy(), range(150, 169), **BAD_GRADIENT),
        change(noisy(), [150], nonfinite_updates=1),
        change(noisy(), range(150, 169), gradient_norm=None),
        risen(30.0, 150, 153),
        change(noisy(), [150, 160, 170], loss=1e30),
        risen(0.3, 150),
    ],
    ids=["19_nan", "1_broken_update", "19_skips", "3_loss", "single_losses", "slightly_higher"],
)
def test_what_passes_by_itself_does_not_ask(steps):
    assert asked_at(steps) == ("none", None)


def test_a_row_is_not_ended_by_a_skip_of_another_kind():
    steps = change(noisy(), [150, 153], updates_broken=True)
    steps[151:153] = [Signals(gradient_norm=None), Signals(**BAD_GRADIENT)]
    assert asked_at(steps) == ("inner_state", 153)


def _after_rollback(steps: list[Signals], grace: int, **left: float) -> list[str]:
    """What the law says of steps that follow a rollback at their first one."""
    start = divergence.init()._replace(
        grace=np.int32(grace), **{f"left_{name}": np.float32(x) for name, x in left.items()}
    )

    def one(state, seen_why):
        (state, remembered), (seen, why, skips) = state, seen_why
        state = divergence.assess(state, seen, remembered, why, skips)
        return (
            state,
            statistics.absorb(
                remembered, seen, jnp.array(False), jnp.float32(0), why > 0, jnp.int32(1)
            ),
        ), state

    bad = np.array([bool(s.nonfinite_gradients or s.nonfinite_loss) for s in steps])
    why = np.where(bad, np.int32(1), np.int32(0))
    skips = np.zeros(len(steps), np.int32)
    for i, b in enumerate(bad):
        skips[i] = skips[i - 1] + 1 if b else 0
    begin = (start, statistics.init())
    states = jax.jit(lambda *xs: jax.lax.scan(one, begin, xs)[1])(batch(steps), why, skips)
    return [name_of(i) for i in np.asarray(states.rollback_asked)]


def test_a_lasting_fault_outside_of_the_state_does_not_ask_again():
    """The state was proven good: as long as no sound step is seen, another rollback cannot help."""
    steps = change(noisy(), range(300), **BAD_GRADIENT)
    assert set(_after_rollback(steps, divergence.GRACE)) == {"none"}
    steps = change(noisy(), range(50, 300), **BAD_GRADIENT)
    assert _after_rollback(steps, divergence.GRACE).index("skips") == 69


def test_certain_signs_ask_within_the_grace():
    steps = change(noisy(50), [2], parameters_broken=True)
    assert _after_rollback(steps, divergence.GRACE).index("parameters") == 2


def test_after_a_rollback_the_level_of_the_loss_is_learned_anew():
    """A lasting shift of the data's level asks once; a new divergence asks again."""
    shifted = risen(10.0, start=0)
    assert set(_after_rollback(shifted, divergence.GRACE)) == {"none"}
    for step in shifted[100:]:
        step.loss *= 4
    assert _after_rollback(shifted, divergence.GRACE).index("loss") == 103


def test_the_state_holds_no_infinity():
    for leaf in jax.tree.leaves(divergence.init()):
        assert math.isfinite(float(leaf))


# --- the unit of the loss ----------------------------------------------------------------------

SCALED = ("stormy_0", "loss_spikes", "negative_loss", "loss_up_3", "loss_up_1", "loss_drifts_up")


def _told(steps: list[Signals], unit: float) -> tuple[np.ndarray, ...]:
    """All that the law decides, with the loss in another unit."""
    steps = [Signals(**vars(step)) for step in steps]
    for step in steps:
        step.loss = step.loss and unit * step.loss
    state, decision = jax.device_get(scan(batch(steps), BOUNDS))
    held, asking = state.control, state.divergence
    return decision.action, decision.signal, asking.rollback_asked, held.log_scale


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("name", SCALED)
def test_the_unit_of_the_loss_decides_nothing(name, unit):
    for found, expected in zip(
        _told(DIVERGING[name], unit), _told(DIVERGING[name], 1.0), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("shift", [-30.0, -7.0, 10.0, 30.0])
def test_a_constant_in_the_loss_hides_no_divergence(shift):
    for steps, expected in [(noisy(), "none"), (risen(30.0, start=150), "loss")]:
        for step in steps:
            step.loss += shift
        assert asked_at(steps)[0] == expected


@pytest.mark.parametrize(
    "losses",
    [
        np.full(400, 3.0),
        np.zeros(400),
        np.geomspace(1, 1e-38, 400),
        np.geomspace(1e30, 1e-12, 400),
        np.r_[np.ones(200), np.full(200, 1.02)],
        -np.linspace(0, 1e5, 400),
    ],
    ids=["constant", "zero", "to_zero", "far", "2_per_cent", "reward"],
)
def test_a_loss_without_noise_does_not_ask(losses):
    steps = [Signals(loss=float(np.float32(x))) for x in losses]
    assert asked_at(steps) == ("none", None)
    for leaf in jax.tree.leaves(assess(steps)):
        assert np.isfinite(leaf).all()


# --- a loss that rises for a good reason -------------------------------------------------------


def test_what_rises_slowly_does_not_ask():
    """By less in fifty steps than shows: going back by fifty steps cannot undo it."""
    steps = noisy(length=1500)
    for i, step in enumerate(steps):
        step.loss += 0.002 * i
    assert asked_at(steps) == ("none", None)


@pytest.mark.parametrize("rise", [1.0, 5.0])
def test_a_rise_that_is_there_again_after_the_rollback_is_the_datas(rise):
    """Then another of its size does not ask, and one of ten times its size does."""
    steps = [Signals(loss=3 + 0.05 * float(x)) for x in np.random.default_rng(3).normal(size=600)]
    for step in steps[200:]:
        step.loss += rise
    for step in steps[500:]:
        step.loss += 10 * rise
    at_once, came_again = {"lowest": 3 - rise, "recent": 3.0}, {"lowest": 2.9, "recent": 3 + 5.0}
    assert 503 <= _after_rollback(steps, divergence.GRACE, **at_once).index("loss") <= 510
    assert _after_rollback(steps, divergence.GRACE, **came_again).index("loss") == 203


@pytest.mark.parametrize(("steps_up", "asks"), [(100, False), (1, True)])
def test_a_rise_that_slowly_comes_about_again_is_the_objectives(steps_up, asks):
    """After a rollback for a rise: as the KL term of a policy that learns; a jump asks again."""
    noise = np.random.default_rng(3).normal(size=600)
    steps = [
        Signals(loss=3 + 0.05 * float(x) + min(max(i - 60, 0) / steps_up, 1.0))
        for i, x in enumerate(noise)
    ]
    asked = _after_rollback(steps, divergence.GRACE, lowest=3.0, recent=4.0)
    assert (asked[-1] == "loss") == asks
    assert _after_rollback(steps, divergence.GRACE)[-1] == "loss"


def test_batches_without_a_target_teach_no_level():
    """Loss 0 and gradient 0: the runs with and without them decide the same."""
    masked = Signals(gradient_norm=0.0, loss=0.0)
    steps = noisy(200)
    with_them = [s for i, step in enumerate(steps) for s in ([masked] * (i % 3) + [step])]
    assert asked_at(with_them) == ("none", None)
    plain, found = (
        jax.device_get(scan(batch(x), BOUNDS)[0].statistics) for x in (steps, with_them)
    )
    for name in ("loss", "loss_slow", "loss_start", "gradient"):
        assert getattr(found, name).mean[-1] == getattr(plain, name).mean[-1]
    assert asked_at(change(risen(30.0, 150), range(140, 150), loss=0.0, gradient_norm=0.0)) == (
        "loss",
        153,
    )


@pytest.mark.parametrize(("at", "parameters"), [(200, True), (140, False)])
def test_a_certain_sign_overrules_an_uncertain_one(at, parameters):
    steps = change(risen(30.0, 150), [at], parameters_broken=True)
    asked = [name_of(i) for i in assess(steps).rollback_asked]
    assert asked[153] == ("loss" if parameters else "parameters")
    assert asked[-1] == "parameters"

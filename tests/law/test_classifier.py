"""The classifier of the law: its arithmetic, what it may not do, and what it says of plain runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support import AS_USUAL, slowly
from trajectories import BOUNDS, DIVERGING, TRAJECTORIES, batch, change, noisy, scan

import lbw_optax
from lbw_optax import law
from lbw_optax.law import adapting, classifier, events
from lbw_optax.law.classifier import CELLS, HORIZONS, INPUTS, Kind, Weights
from lbw_optax.law.control import Action


def risks(steps, rows=slice(None)):
    state, _ = scan(batch(steps), BOUNDS)
    return jax.tree.map(lambda x: np.asarray(x)[rows], state.classifier.risk)


def random_weights(seed: int = 0, size: float = 1.0) -> Weights:
    rng = np.random.default_rng(seed)
    shipped = classifier.shipped()
    return Weights(*(np.float32(size * rng.standard_normal(np.shape(x))) for x in shipped))


def test_the_unit_is_a_gated_recurrent_unit():
    """Against one written cell by cell, in float64."""
    weights = random_weights(size=0.5)
    rng = np.random.default_rng(1)
    found, cells = rng.standard_normal(INPUTS), rng.uniform(-1, 1, CELLS)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    expected = np.zeros(CELLS)
    for i in range(CELLS):
        gates = {}
        for place, gate in enumerate(("keep", "reset", "new")):
            column = place * CELLS + i
            gates[gate] = (
                found @ weights.inputs[:, column] + weights.bias[column],
                cells @ weights.cells[:, column],
            )
        keep = sigmoid(sum(gates["keep"]))
        new = np.tanh(gates["new"][0] + sigmoid(sum(gates["reset"])) * gates["new"][1])
        expected[i] = (1 - keep) * new + keep * cells[i]
    got = classifier.advance(weights, jnp.float32(cells), jnp.float32(found))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def decided():
    """The law over a run, with these weights in the place of the shipped ones; compiled once."""

    @functools.partial(jax.jit, static_argnames="adapts")
    def run(weights, seen, adapts=False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classifier, "shipped", lambda: weights)
            state, decision = jax.lax.scan(
                lambda state, one: law.step(state, one, BOUNDS),
                law.init(BOUNDS, adapts=adapts),
                seen,
            )
        return state.classifier.cells, state._replace(classifier=()), decision

    return run


@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("says", ["nothing", "everything", "noise", "nan"])
def test_it_advises_and_decides_nothing(says, adapts, decided):
    shipped = classifier.shipped()
    other = {
        "nothing": jax.tree.map(np.zeros_like, shipped),
        "everything": shipped._replace(output_bias=np.float32([1e9, 1e9, 0, 1e9, 0])),
        "noise": random_weights(size=10.0),
        "nan": jax.tree.map(lambda x: np.full_like(x, np.nan), shipped),
    }[says]
    for name in ("healthy", "stormy_0", "gradient_spikes", "loss_up_3"):
        run = batch(DIVERGING[name])
        _, *expected = decided(shipped, run)
        cells, *found = decided(other, run, adapts=adapts)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert says == "everything" or not np.array_equal(cells, decided(shipped, run)[0])


@pytest.mark.parametrize("steps", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_what_it_says_are_probabilities(steps):
    risk = risks(steps)
    for x in jax.tree.leaves(risk):
        assert ((x >= 0) & (x <= 1)).all()
    np.testing.assert_allclose(risk.kinds.sum(-1), 1, rtol=1e-5)
    assert (risk.later >= risk.soon).all()


numbers = st.sampled_from([0.0, -1.0, 1e-30, 0.3, 4.0, 1e8, 3e38, -3e38])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, st.booleans(), st.booleans()), min_size=6, max_size=6))
def test_no_number_leaves_it_without_a_word(steps):
    """Whatever a run shows, the cells stay finite, and so does what they say."""
    changed = noisy()
    for step, (loss, norm, has_loss, has_norm) in zip(changed[2:], steps, strict=False):
        step.loss = loss if has_loss else None
        step.gradient_norm = abs(norm) if has_norm else None
        step.nonfinite_loss = int(not has_loss)
    state, _ = scan(batch(changed), BOUNDS)
    assert np.isfinite(state.classifier.cells).all()
    assert np.isfinite(jax.tree.leaves(risks(changed))[0]).all()


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_the_unit_of_the_loss_does_not_matter(unit):
    plain, other = noisy(), noisy()
    for step in other:
        step.loss *= unit
        step.gradient_norm *= unit
    for x, y in zip(risks(plain), risks(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_it_tells_a_run_that_diverges_from_one_that_does_not():
    alarm = float(classifier.shipped().alarm)
    assert (risks(noisy()).soon < alarm).all()
    rising = noisy()
    for t, step in enumerate(rising[200:]):
        step.loss += 0.05 * 1.2 ** min(t, 60)
        step.gradient_norm *= 1.1 ** min(t, 60)
    assert (risks(rising, slice(200, 240)).soon > alarm).any()
    assert (risks(rising, slice(0, 200)).soon < alarm).all()


def test_a_loss_that_is_not_finite_has_diverged():
    steps = change(noisy(), [50], nonfinite_loss=1, loss=None)
    assert risks(steps).soon[50] == risks(steps).later[50] == 1


def test_it_is_in_the_metrics_and_in_the_sentence():
    """Of a real run that is lost: steps far too long, without anything that could hold them."""
    tx = lbw_optax.lbw_guard(optax.sgd(2.2), min_scale=1.0)
    params = jnp.ones(8)

    def loss(x):
        return jnp.sum(x**4) + jnp.sum(x**2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, lbw_optax.metrics(state)

    state, highest = tx.init(params), 0.0
    assert "may diverge" not in lbw_optax.explain(state)
    for _ in range(12):
        params, state, metrics = step(params, state)
        highest = max(highest, float(metrics["risk_10"]))
    assert highest > float(classifier.shipped().alarm)
    kinds = sum(float(metrics[kind.name.lower()]) for kind in Kind)
    assert kinds == pytest.approx(1, abs=1e-5)


def test_an_alarm_is_one_event_until_the_risk_has_fallen():
    """And it is never recorded in the place of another action."""
    alarm = float(classifier.shipped().alarm)
    steps = noisy()
    for t, step in enumerate(steps[200:260]):
        step.loss += 0.05 * 1.2**t
    seen = batch(steps)
    state, decision = scan(seen, BOUNDS)
    before = jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]), state)
    told = jax.vmap(classifier.reported)(decision, before.classifier, state.classifier)
    alarmed, soon = np.asarray(state.classifier.alarmed), risks(steps).soon
    expected, was = [], False
    for risk in soon:
        was = risk > (alarm / 2 if was else alarm)
        expected.append(was)
    np.testing.assert_array_equal(alarmed, expected)
    begins = alarmed & ~np.append(False, alarmed[:-1])
    free = np.asarray(decision.action) == Action.NONE
    assert (begins & free).any()
    rows = np.asarray(told.action) == events.ALARM
    np.testing.assert_array_equal(rows, begins & free)
    np.testing.assert_allclose(np.asarray(told.value)[rows], soon[rows], rtol=1e-6)
    np.testing.assert_array_equal(told.action[~rows], decision.action[~rows])


# --- learning in the run ------------------------------------------------------------------------


def learned(cells, diverged, broken, weights=None) -> adapting.Adapted:
    """What has been learned after each step."""
    weights = classifier.shipped() if weights is None else weights

    def one(adapted, now):
        cells, diverged, broken = now
        excess = jnp.where(diverged, classifier.divergence.ENOUGH_EVIDENCE, 0.0)
        adapted = classifier.adapt(adapted, weights, cells, excess, broken)
        return adapted, adapted

    first = classifier.init(adapts=True).adapted
    given = jnp.float32(cells), jnp.array(diverged), jnp.array(broken)
    return jax.device_get(jax.jit(lambda x: jax.lax.scan(one, first, x)[1])(given))


def shifts(cells, diverged, broken, weights) -> np.ndarray:
    """The same from a list of predictions, each with the step in which it was made; float64."""
    shipped = np.append(weights.outputs, weights.output_bias[None], axis=0)[:, :2].astype(float)
    shift, waiting, found = np.zeros((CELLS + 1, 2)), [], []
    for t, here in enumerate(cells):
        change = np.zeros_like(shift)
        for made, x in waiting:
            if not (diverged[t] or t - made == 50):
                continue
            for column, horizon in enumerate(HORIZONS):
                y = diverged[t] and t - made <= horizon
                said = 1 / (1 + np.exp(-x @ (shipped + shift)[:, column]))
                change[:, column] += x * (said - y) / (x @ x)
        shift = shift - adapting.RATE * change
        for column in range(2):
            far = np.linalg.norm(shift[:, column])
            shift[:, column] *= min(1, adapting.RADIUS / far) if far else 1
        waiting = [] if diverged[t] else [(made, x) for made, x in waiting if t - made < 50]
        if t % 5 == 0:
            waiting.append((t, np.append(here, 1)))
        if diverged[t] or broken[t]:
            waiting = []
        found.append(shift.copy())
    return np.array(found)


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_it_learns_from_predictions_that_are_settled(size):
    rng = np.random.default_rng(0)
    cells, weights = rng.uniform(-1, 1, (400, CELLS)), random_weights(size=size)
    diverged, broken = np.zeros((2, 400), bool)
    diverged[[120, 121, 122, 300]] = broken[200] = True
    expected = shifts(cells, diverged, broken, weights)
    got = learned(cells, diverged, broken, weights).shift
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    far = np.linalg.norm(got, axis=1)
    assert (far < adapting.RADIUS * (1 + 1e-5)).all()
    assert far.max() == pytest.approx(adapting.RADIUS, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_teaches_nothing(bad):
    rng, nothing = np.random.default_rng(0), np.zeros(200, bool)
    cells = rng.uniform(-1, 1, (200, CELLS))
    cells[20, 3] = bad
    shift = learned(cells, nothing, nothing).shift
    np.testing.assert_array_equal(shift[70], shift[69])
    assert np.isfinite(shift).all()
    assert (shift[75] != shift[74]).all()


def test_alarms_that_come_to_nothing_lower_the_next_ones_and_divergences_raise_them():
    """Of one pattern of cells, again and again; down as far as the ball lets it go."""
    shipped = classifier.shipped()
    toward = 3 * shipped.outputs[:, 0] / np.linalg.norm(shipped.outputs[:, 0])
    cells, nothing = np.tile(np.tanh(toward), (400, 1)), np.zeros(400, bool)
    diverged = np.arange(400) % 20 == 19
    x = np.append(cells[0], 1)
    for came in (nothing, diverged):
        after = jax.tree.map(lambda leaf: leaf[-1], learned(cells, came, nothing))
        before, now = (
            classifier.risk(shipped, jnp.float32(cells[0]), jnp.array(False), learnt)
            for learnt in ((), after)
        )
        if came.any():
            assert now.later > before.later
        else:
            most = -adapting.RADIUS * np.linalg.norm(x)
            np.testing.assert_allclose(x @ after.shift, most, rtol=1e-4)
            assert now.later < before.later


def test_what_was_learned_outlives_a_rollback():
    rng, nothing = np.random.default_rng(0), np.zeros(100, bool)
    after = learned(rng.uniform(-1, 1, (100, CELLS)), nothing, nothing)
    early = classifier.init()._replace(adapted=jax.tree.map(lambda x: x[40], after))
    left = classifier.init()._replace(adapted=jax.tree.map(lambda x: x[99], after))
    gone_on = classifier.after_rollback(early, left).adapted
    np.testing.assert_array_equal(gone_on.shift, left.adapted.shift)
    assert np.any(early.adapted.shift != gone_on.shift)
    assert not np.any(gone_on.kept)
    plain = classifier.init()
    assert classifier.after_rollback(plain, plain) is plain


PLACES = {
    "around": lambda **on: lbw_optax.lbw_guard(optax.adam(0.1), **on),
    "before": lambda **on: optax.chain(lbw_optax.lbw_guard(**on), optax.adam(0.1)),
    "chain": lambda **on: lbw_optax.chain(lbw_optax.lbw_guard(**on), optax.adam(0.1)),
}


@pytest.mark.parametrize("place", ["around", *slowly("before", "chain")])
def test_it_learns_where_a_user_asks_for_it_and_no_update_is_another_one(place):
    """And its state is read in the forms that frameworks and files give it."""

    def run(**on):
        tx = PLACES[place](**on)
        params = jnp.ones(8)
        state, update = tx.init(params), jax.jit(tx.update, compiler_options=AS_USUAL)
        for step in range(60):
            updates, state = update(params + jnp.sin(step), state, params, value=jnp.sum(params**2))
            params = optax.apply_updates(params, updates)
        return params, state, update

    (plain, unadapted, _), (params, state, update) = run(), run(adapt_risk=True)
    np.testing.assert_array_equal(plain, params)
    assert optax.tree.get(unadapted, "shift") is None
    assert np.any(optax.tree.get(state, "shift"))
    loaded = jax.tree.map(np.asarray, state)
    expected = update(params, state, params, value=1.0)
    again = jax.jit(PLACES[place](adapt_risk=True).update, compiler_options=AS_USUAL)
    got = again(params, loaded, params, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    before = lbw_optax.metrics(state)
    jax.tree.map(np.testing.assert_array_equal, lbw_optax.metrics(loaded), before)


@pytest.mark.parametrize("on", [False, True])
def test_it_is_read_out_of_nnx_whether_it_learns_or_not(on):
    tx = lbw_optax.lbw_guard(optax.adam(0.1), adapt_risk=on)
    optimizer = nnx.Optimizer(nnx.Linear(8, 1, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    pure = nnx.to_pure_dict(nnx.split(optimizer)[1])["opt_state"]
    assert ("adapted" in pure["law"]["classifier"]) == on
    assert float(lbw_optax.metrics(pure)["risk_10"]) == 0
    assert lbw_optax.override(pure, scale=0.5).keys() == pure.keys()


def test_the_switch_is_a_bool():
    with pytest.raises(ValueError, match=r"adapt_risk must be True or False, got 0\.5"):
        lbw_optax.lbw_guard(optax.adam(0.1), adapt_risk=0.5)

"""Guards in every nest that a framework makes, of every kind of number, and of every size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference import cosine, flat, mean_parameters
from support import (
    PLACEMENTS,
    assert_same_bits,
    gradients_of,
    guard_in,
    guarded,
    run_of,
    small_params,
    train,
    types,
)

import lbw_optax
from lbw_optax import lbw_guard
from lbw_optax.law import divergence, telemetry

LAYER = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
LARGE = {
    "2^31 - 1 and a bit, in all": {f"w{i}": LAYER for i in range(128)},
    "8e9 in all": {f"w{i}": LAYER for i in range(480)},
    "a leaf of 2^31": {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)},
    "a leaf of 1.9e10": {"w": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)},
}
BOTH = {
    "wrapped": lambda: lbw_guard(optax.adamw(1e-3)),
    "chained": lambda: optax.chain(lbw_guard(), optax.adamw(1e-3)),
}


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("params", LARGE.values(), ids=LARGE)
def test_more_than_2e31_parameters_by_shape_evaluation(params, make):
    tx = make()

    def two_steps(params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params, value=1.0)
        return updates, lbw_optax.metrics(state)

    updates, metrics = jax.eval_shape(two_steps, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert {x.dtype.name for x in jax.tree.leaves(metrics)} == {*("float32", "int32", "bool")}


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_init_takes_abstract_parameters(make):
    """As Optax's own transformations do: the state is that of zeros in these shapes."""
    abstract = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
    found, expected = make().init(abstract), make().init(jnp.zeros((2, 4, 8)))
    assert_same_bits(found, expected)


# --- kinds of numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bit_floats(dtype):
    """The norm is NumPy's, the updates are those of the bare optimizer times the scale."""
    tx, params = lbw_guard(optax.sgd(0.5), min_scale=1.0), {"q": jnp.full((4, 4), 2.0, dtype)}
    updates, state = tx.update(params, tx.init(params), params, value=1.0)
    assert updates["q"].dtype == dtype
    np.testing.assert_array_equal(updates["q"].astype(jnp.float32), -1.0)
    assert float(lbw_optax.metrics(state)["gradient_norm"]) == 8.0


def test_leaves_of_integers_stay_out_though_their_updates_are_floats():
    params = {"w": jnp.ones((8, 1)), "n": jnp.arange(3)}
    gradients = {"w": jnp.ones((8, 1)), "n": jnp.zeros(3, jnp.int32)}
    run = run_of(lbw_guard(optax.sgd(1e-2)))
    state = run.init(params)
    for _ in range(3):
        updates, state = run.update(gradients, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["n"], np.arange(3))
    assert float(lbw_optax.metrics(state)["overshoot"]) == pytest.approx(-1)


def test_complex_parameters_have_an_overshoot():
    """That of real and imaginary parts: Optax wants the conjugate of what `jax.grad` gives."""
    rng, run = np.random.default_rng(0), run_of(lbw_guard(optax.sgd(0.1, momentum=0.9)))
    drawn = (rng.normal(size=(5, 3, 4)) + 1j * rng.normal(size=(5, 3, 4))).astype(np.complex64)
    parts = lambda x: flat([np.real(x), np.imag(x)])  # noqa: E731
    params, mean = drawn[0], None
    state = run.init(params)
    for step, gradients in enumerate(drawn[1:]):
        updates, state = run.update(gradients, state, params, value=1.0)
        here, params = parts(params), optax.apply_updates(params, updates)
        before, mean = mean, mean_parameters(mean, here, step + 1)
        if before is not None:
            expected = cosine(parts(gradients), here - before)
            found = lbw_optax.metrics(state)["overshoot"]
            np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- nests --------------------------------------------------------------------------------------


def test_a_state_out_of_nnx_split():
    """NamedTuples are mappings there, as MaxText keeps them: read, overridden, merged again."""
    model = nnx.Linear(8, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lbw_optax.adamw(1e-2), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    before = lbw_optax.metrics(optimizer.opt_state)
    assert_same_bits(lbw_optax.metrics(state), before)
    changed = lbw_optax.override(state, scale=0.25)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    merged = nnx.merge(graph, changed)[1].opt_state
    assert float(lbw_optax.metrics(merged)["scale"]) == 0.25
    assert lbw_optax.events(changed) == []
    lbw_optax.check(changed)
    assert len(jax.tree.leaves(lbw_optax.strip(state))) < len(jax.tree.leaves(state))


def test_a_guard_that_another_version_made_is_told_and_its_optimizer_gone_on_with():
    tx = lbw_optax.adamw(1e-2)
    optimizer = nnx.Optimizer(nnx.Linear(8, 1, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    old = nnx.to_pure_dict(nnx.split(optimizer)[1])["opt_state"]
    del old["law"]["classifier"]
    for read in (lbw_optax.metrics, lbw_optax.explain, lbw_optax.reset):
        with pytest.raises(ValueError, match="has no classifier: another version"):
            read(old)
    with pytest.raises(ValueError, match=r"a state of mappings \(dict\)"):
        tx.update(jnp.ones(3), old, jnp.ones(3))
    bare = lbw_optax.strip(old)
    assert 0 < len(jax.tree.leaves(bare)) < len(jax.tree.leaves(old))
    with pytest.raises(ValueError, match="holds no guard"):
        lbw_optax.strip(bare)


def plain_number(x):
    return x.item() if np.ndim(x) == 0 else x


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", [np.asarray, lambda x: plain_number(np.asarray(x))])
def test_a_state_out_of_a_file_is_updated_without_jit(kind, placement):
    """NumPy's arrays, and plain numbers, as npz and msgpack give them."""
    tx, params = PLACEMENTS[placement](optax.sgd(0.1, momentum=0.9)), jnp.arange(3.0)
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    loaded = jax.tree.map(kind, state)
    bad, value = np.full(3, np.nan, np.float32), np.float32(2)
    updates, after = tx.update(bad, loaded, np.arange(3, dtype=np.float32), value=value)
    expected = tx.update(jnp.asarray(bad), state, params, value=value)
    assert_same_bits((updates, after), expected)
    assert types(guard_in(after)) == types(guard_in(expected[1]))
    assert len(lbw_optax.events(loaded)) == len(lbw_optax.events(state))


@pytest.mark.parametrize("read", [lbw_optax.events, lbw_optax.explain], ids=["events", "explain"])
def test_several_runs_in_one_state_are_named(read):
    state = jax.vmap(lbw_optax.adamw(1e-2).init)(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="3 runs in one"):
        read(state)
    assert read(jax.tree.map(lambda x: x[0], state)) is not None


def test_check_finds_the_one_run_of_several_that_is_exhausted():
    tx, params = lbw_guard(optax.sgd(0.1), max_skips=2), jnp.ones((3, 4))
    state = jax.vmap(tx.init)(params)
    update = jax.vmap(lambda g, s, p: tx.update(g, s, p, value=1.0))
    gradients = params.at[1].set(jnp.nan)
    _, state = update(gradients, state, params)
    lbw_optax.check(state)
    _, state = update(gradients, state, params)
    with pytest.raises(lbw_optax.GuardExhausted, match="2 in a row"):
        lbw_optax.check(state)


def test_several_guards_are_told_apart_by_their_path():
    labels = {"bias": "a", "gain": "a", "weights": "b"}
    parts = {"a": lbw_guard(optax.sgd(0.1)), "b": lbw_guard(optax.adamw(0.1))}
    run, params = run_of(optax.partition(parts, labels)), small_params()
    state, good = run.init(params), gradients_of(params)
    bad = {**good, "weights": good["weights"] * np.float32(np.nan)}
    _, state = run.update(bad, state, params, value=np.float32(1))
    metrics = jax.jit(lbw_optax.metrics)(state)
    alone = lbw_optax.metrics(state.inner_states["b"])
    assert set(metrics) == {f"inner_states/{part}/inner_state/{n}" for part in "ab" for n in alone}
    assert int(metrics["inner_states/a/inner_state/skips"]) == 0
    assert int(metrics["inner_states/b/inner_state/skips"]) == 1
    (event,) = lbw_optax.events(state)
    assert (event.guard, event.action) == ("inner_states/b/inner_state", "skip")


# --- optimizers that it does not govern ----------------------------------------------------------


def test_lookahead_goes_around_the_guard():
    params = optax.LookaheadParams.init_synced(small_params())
    gradients = gradients_of(params.fast)
    tx = lbw_guard(optax.lookahead(optax.sgd(0.1), 3, 0.5))
    with pytest.raises(ValueError, match=r"optax\.lookahead\(lbw_guard"):
        tx.update(gradients, tx.init(params), params, value=1.0)
    tx = optax.lookahead(lbw_guard(optax.sgd(0.1)), 3, 0.5)
    _, state = tx.update(gradients, tx.init(params), params)
    assert int(lbw_optax.metrics(state)["skips"]) == 0


@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.chain, lambda tx: optax.masked(tx, True)])
def test_a_guard_in_a_guard_is_refused(wrap):
    with pytest.raises(ValueError, match=r"another lbw_guard in it.* leave one of them out"):
        lbw_guard(wrap(lbw_guard(optax.adamw(1e-2)))).init(small_params())


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("sam", lambda tx: optax.contrib.sam(tx, optax.sgd(0.05), sync_period=2)),
        ("schedule_free", lambda tx: optax.contrib.schedule_free(tx, 0.05)),
    ],
)
def test_it_goes_around_the_guard(name, around):
    with pytest.raises(ValueError, match=rf"optax\.contrib\.{name}\(lbw_guard"):
        lbw_guard(optax.chain(around(optax.adamw(1e-2)))).init(small_params())
    run, params = run_of(around(lbw_guard(optax.adamw(0.05)))), small_params()
    state = run.init(params)
    for _ in range(400):
        updates, state = run.update(gradients_of(params), state, params)
        params = optax.apply_updates(params, updates)
    start = optax.tree.norm(gradients_of(small_params()))
    assert optax.tree.norm(gradients_of(params)) < 0.3 * start


def losses_of(tx, start, target, steps):
    """Of full-batch steps on the squared distance, and the state after them."""

    def step(carry, _):
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda p: jnp.sum((p - target) ** 2))(params)
        updates, state = tx.update(gradients, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (_, state), losses = run((start, tx.init(start)))
    return losses, state


@pytest.mark.parametrize("place", ["inside", "around"])
def test_the_soft_start_is_no_plateau(place):
    """From all zeros: the rate is cut where the loss has ended to fall, and not before."""
    plateau = lambda inner: optax.chain(inner, optax.contrib.reduce_on_plateau())  # noqa: E731
    inner, target = optax.sgd(0.02), jnp.array([[3.0, -2.0], [1.0, 4.0]])
    tx = lbw_guard(plateau(inner)) if place == "inside" else plateau(lbw_guard(inner))
    for steps, scale in ((50, 1.0), (600, 0.0)):
        losses, state = losses_of(tx, jnp.zeros((2, 2)), target, steps)
        found = optax.tree.get(
            state, "scale", filtering=lambda path, _: "Plateau" in repr(path[-1])
        )
        np.testing.assert_allclose(found, scale, atol=1e-3)
    assert losses[-1] < 1e-9 * losses[0]


def test_mechanize_goes_inside_the_guard():
    mechanized = optax.contrib.mechanize(optax.sgd(0.1), weight_decay=0.0)
    start, target = jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])
    bare, _ = losses_of(mechanized, start, target, 1000)
    guarded_losses, _ = losses_of(lbw_guard(mechanized), start, target, 1000)
    assert guarded_losses[-100:].mean() < max(2 * bare[-100:].mean(), 1e-4 * bare[0])


# --- in words -----------------------------------------------------------------------------------


def told(changes) -> str:
    run, params = guarded("adamw"), small_params()
    _, state = train(run, params, run.init(params), 3)
    return lbw_optax.explain(changes(run, params, state))


def _skipped(run, params, state):
    bad = jax.tree.map(lambda g: g * np.float32(np.nan), gradients_of(params))
    for _ in range(2):
        _, state = run.update(bad, state, params, value=np.float32(1))
    return state


def _held(scale, mode="govern"):
    def change(run, params, state):
        state = lbw_optax.override(lbw_optax.override(state, scale=scale), scale="auto", mode=mode)
        control = state.law.control._replace(settled=jnp.array(True))
        return state._replace(law=state.law._replace(control=control))

    return change


def _exhausted(run, params, state):
    control = state.law.control._replace(exhausted=jnp.array(True))
    return state._replace(law=state.law._replace(control=control))


def _asking(run, params, state):
    asked = jnp.int32(divergence.Reason.LOSS)
    asking = state.law.divergence._replace(rollback_asked=asked)
    return state._replace(law=state.law._replace(divergence=asking))


def _resting(rejected):
    """At 2 % since step 12, of 33, and with that share of rejected steps."""

    def change(run, params, state):
        state = _held(0.02)(run, params, state)
        control = state.law.control
        control = control._replace(
            rest=control.rest._replace(steps=jnp.int32(20)),
            rejections=control.rejections._replace(
                share=jnp.float32(rejected), steps=jnp.int32(400), newest=jnp.int32(4)
            ),
        )
        return state._replace(law=state.law._replace(control=control), guard_steps=jnp.int32(33))

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run, params, state: state, "Soft start, step 3: updates at"),
        (_skipped, "Skipping since step 3: gradients are not finite."),
        (lambda *x: lbw_optax.override(x[2], scale=0.5), "A person holds updates at 50 %"),
        (_held(1.0), "Nominal at step 3: updates at 100 %, 0 steps skipped."),
        (_held(0.02), "Holding updates at 2 % since the start: the learning rate looks 50 times"),
        (
            _resting(0.01),
            "Holding updates at 2 % since step 12: the learning rate looks 50 times too high.",
        ),
        (
            _resting(0.07),
            (
                "Holding updates at 2 % since step 12: the learning rate looks 50 times too high. "
                "7 % of the last 400 steps were rejected, the newest for this: the gradient is far "
                "longer than this run has shown. Look at the data."
            ),
        ),
        (
            _held(0.02, "observe"),
            (
                "It only observes: the optimizer's own updates were applied. Governing, it would "
                "say: Holding updates at 2 %"
            ),
        ),
        (_exhausted, "The guard is exhausted after 3 steps: 0 skipped in all"),
        (_asking, "Asking for a rollback at step 3: the loss has risen and stays there."),
    ],
    ids=[
        *("soft start", "skips", "pinned", "nominal", "held", "rest", "rejecting", "observed"),
        *("exhausted", "asking"),
    ],
)
def test_explain(change, sentence):
    assert told(change).startswith(sentence)


def test_telemetry_samples_no_more_than_it_says():
    tree = {"w": jnp.ones((512, 512)), "b": jnp.ones(7)}
    assert telemetry.sample_of_zeros(tree).shape == telemetry.sample(tree).shape

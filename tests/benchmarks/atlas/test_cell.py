"""A tiny task of each family learns, and what stands between training and models is undone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.atlas import cell, data, draw, models
from benchmarks.atlas.methods import METHODS, own

pytestmark = pytest.mark.process

TINY = draw.tasks()["c00-decoder-512x1"]._replace(
    name="tiny",
    block="pre-norm",
    width=16,
    depth=1,
    batch=8,
    length=16,
    vocabulary=256,
    steps=30,
    optimizer="AdamW",
    b2=0.95,
    weight_decay=0.01,
    clip=1.0,
    schedule="cosine",
    warmup=0.1,
    init="standard",
    layout="matrices",
    dtype="float32",
    start="scratch",
    rank=0,
)
LOSS = jax.jit(models.loss, static_argnums=0)
WORDS = b"the cat sat on the mat and the dog sat on the cat. "


@pytest.fixture(scope="module", autouse=True)
def texts(tmp_path_factory):
    """Little text in place of the library, so that nothing is tokenised."""
    train = np.frombuffer(WORDS * 80, np.uint8).astype(np.int32)
    code = np.frombuffer(b"import os\nx = [1, 2]\n" * 100, np.uint8).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "text", lambda *_: data.Text(train, train[:400], code, "digest"))
        # The models are tiny: compiling them well takes longer than running them.
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def of_family(family, block, **facts):
    sizes = {
        "sequence": {"vocabulary": 8, "length": 8},
        "diffusion": {"vocabulary": 16, "length": 16},
        "convolution": {"vocabulary": 10, "length": 16, "batch": 32},
        "classifier": {"vocabulary": 10, "length": 1, "batch": 64},
        "regression": {"vocabulary": 1, "length": 1, "batch": 64},
    }
    return TINY._replace(family=family, block=block, **{**sizes.get(family, {}), **facts})


@pytest.mark.parametrize(
    ("family", "block", "facts"),
    [
        ("decoder", "post-norm", {"layout": "stacked", "optimizer": "Lion"}),
        ("decoder", "QK-norm", {"layout": "heads", "dtype": "bfloat16"}),
        ("experts", "pre-norm", {}),
        ("recurrence", "scan", {"init": "muP"}),
        ("convolution", "residual", {"optimizer": "SGD"}),
        ("classifier", "plain", {"schedule": "WSD"}),
        ("diffusion", "adaptive", {"init": "zero output"}),
        ("sequence", "sort", {"schedule": "inverse root"}),
        ("regression", "plain", {"optimizer": "Adafactor"}),
    ],
)
def test_a_tiny_task_of_each_family_learns(family, block, facts):
    task = of_family(family, block, **facts)
    lr = {"Lion": 3e-3, "SGD": 0.1, "Muon": 0.02, "Adafactor": 0.03}.get(task.optimizer, 0.01)
    found = cell.run_cell(task, own, 3 * lr if task.init == "muP" else lr, seed=0)
    assert found["loss"] < found["before"] * 0.97
    assert len(found["valid_curve"]) == draw.POINTS
    assert found["metrics"] == {}


@pytest.mark.parametrize("block", ["pre-norm", "parallel"])
@pytest.mark.parametrize(("init", "layout"), [("muP", "stacked"), ("zero output", "heads")])
def test_what_is_trained_becomes_the_matrices_of_the_model(block, init, layout):
    task = TINY._replace(block=block, init=init, layout=layout, width=64, depth=2)
    trained = models.init(task, 0)
    found = models.weights(task, trained)
    assert {name: w.shape for name, w in found.items()} == {
        name: leaf.shape for name, leaf in models.shapes(task).items()
    }
    if layout == "heads":
        assert trained["0.query"].shape == (64, 2, 32)
        assert trained["0.out"].shape == (2, 32, 64)
        np.testing.assert_array_equal(found["leave"], 0)
        np.testing.assert_array_equal(found["1.down"], 0)
    else:
        assert trained["up"].shape == (2, 64, 256)
        assert float(jnp.std(trained["up"])) == pytest.approx(1, abs=0.02)
        assert float(jnp.std(found["1.down"])) == pytest.approx(1 / 16, rel=0.05)
    assert float(jnp.std(found["0.up"])) == pytest.approx(1 / 8, rel=0.05)


def test_both_scans_are_one_recurrence():
    task = of_family("recurrence", "scan")
    weights = models.init(task, 0)
    tokens = jnp.asarray(data.pool(task, None).train[:4])
    one, other = (
        LOSS(task._replace(block=block), weights, tokens) for block in ("scan", "associative")
    )
    assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_adapters_start_at_the_base_and_change_the_layers_alone():
    task = TINY._replace(start="LoRA", rank=2, depth=2)
    base, factors = models.init(task, 0), models.adapters(task, 1)
    for name, w in models.adapted(base, factors).items():
        np.testing.assert_array_equal(w, base[name])
    moved = models.adapted(base, jax.tree.map(lambda x: x + 0.1, factors))
    changed = {name for name, w in moved.items() if not np.array_equal(w, base[name])}
    assert changed == {name for name in base if name[0] in "01" and "norm" not in name}
    expected = base["0.up"] + 2 * (factors["0.up.A"] + 0.1) @ (factors["0.up.B"] + 0.1)
    np.testing.assert_allclose(moved["0.up"], expected, rtol=1e-6)


def test_a_run_is_a_plain_loop_over_its_batches():
    task = of_family("classifier", "residual")
    found = cell.run_cell(task, own, 0.01, seed=3)
    pool = data.pool(task, None)
    batches = data.batches(task, pool.train, 3, task.steps)
    schedule = cell.recipe(task, 0.01).learning_rate
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.01)
    )
    params = models.init(task, 3)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(lambda p: models.loss(task, p, batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(task.steps):
        params, state = step(params, state, jax.tree.map(lambda array, i=i: array[i], batches))
    expected = LOSS(task, params, pool.valid)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_a_fine_tuned_task_starts_from_its_base(tmp_path, monkeypatch):
    task = TINY._replace(start="LoRA", rank=4, shift="far")
    build = METHODS["guard"].build
    found = cell.run_cell(task, build, 0.01, 0, cache=tmp_path, keep=("relative_step",))
    assert len(found["metrics"]["relative_step"]) == task.steps
    base = cell._base(task, None, tmp_path)
    judged = data.pool(task, None).valid[:: cell.CURVE]
    expected = LOSS(task, base, judged)
    assert found["before"] == pytest.approx(float(expected), rel=1e-4)
    cell._base.cache_clear()
    monkeypatch.setattr(cell, "_train_base", lambda *_: pytest.fail("the base was trained again"))
    params, frozen = cell._start(task._replace(start="full", rank=0), 1, None, tmp_path)
    assert frozen is None
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shift", ["none", "near", "far"])
def test_a_base_reads_what_its_shift_says(shift):
    task = TINY._replace(start="full", shift=shift)
    train = data.text(None, 256).train
    own_first, base_first = (pool(task, None).train[0] for pool in (data.pool, data.base_pool))
    tenth = len(train) // 10
    np.testing.assert_array_equal(own_first, train[tenth:][:17] if shift == "near" else train[:17])
    if shift == "far":
        assert sorted(np.unique(base_first, return_counts=True)[1]) == sorted(
            np.unique(own_first, return_counts=True)[1]
        )
        assert not np.array_equal(base_first, own_first)
        code = data.base_pool(task, "a directory").train[0]
        np.testing.assert_array_equal(code, data.text(None, 256).code[210:][:17])
    else:
        np.testing.assert_array_equal(base_first, train[:17])


@pytest.mark.parametrize("schedule", list(draw.SCHEDULES))
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_schedules_rise_to_their_peak_and_fall_as_they_are_named(schedule, warmup):
    task = TINY._replace(schedule=schedule, warmup=warmup, steps=100)
    rate = cell.recipe(task, 2.0).learning_rate
    values = np.array([float(rate(step)) for step in range(100)])
    assert values.max() == pytest.approx(2.0, rel=1e-3)
    assert values[0] == pytest.approx(0.2 if warmup else 2.0, rel=1e-3)
    assert np.all(values >= 0)
    assert np.all(np.diff(values[10:]) <= 1e-6)
    ends = {"constant": 2.0, "cosine": 0.0, "WSD": 0.02, "inverse root": 2 / np.sqrt(10)}
    low = 2 / np.sqrt(20) if schedule == "inverse root" and not warmup else ends[schedule]
    assert values[-1] == pytest.approx(low, abs=0.01)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*((method, "AdamW") for method in METHODS), *(("guard", other) for other in draw.OPTIMIZERS)],
)
def test_every_method_trains_and_the_guard_takes_every_optimizer(method, optimizer):
    """Traced only: what a loop carries must keep its shapes and types."""
    task = of_family("classifier", "plain", optimizer=optimizer)
    pool = data.pool(task, None)
    batches = cell._stretches(data.batches(task, pool.train, 0, task.steps))
    run = cell._compiled(task, METHODS[method].build, ())
    found = jax.eval_shape(run, jnp.float32(0.1), models.init(task, 0), None, batches, pool.valid)
    assert found["loss"].shape == ()
    assert found["curve"].shape == (draw.POINTS,)

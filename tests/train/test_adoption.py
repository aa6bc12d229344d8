"""A run that began without the guard goes on under it, where it was."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from orbax.checkpoint import v1 as ocp
from small_model import SMALL
from support import slowly

import lbw_optax
from train import adoption, data, logs, loop, model, recipes, run
from train.options import Options

pytestmark = pytest.mark.process
MADE = 12
"""Updates of the old run."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight simulated ones."""
    monkeypatch.setattr(run, "mesh", lambda options: None)


@pytest.fixture
def options(tmp_path):
    return Options(
        "small",
        tmp_path / "run",
        steps=20,
        batch_size=4,
        length=16,
        learning_rate=1e-2,
        warmup=0.0,
        dtype="float32",
        eval_every=0,
        save_every=25,
        track=(),
    )


@pytest.fixture(scope="module")
def corpus():
    tokens = np.random.default_rng(0).integers(1, 9, size=2000).astype(np.int32)
    return data.Corpus(tokens, tokens[:300], tokens[-300:], tokenizer=None)


def build():
    return model.Decoder(SMALL, rngs=nnx.Rngs(0))


def train(options, corpus):
    run.check(options)
    cost = run.announce(options, build, nnx.Param)
    return run.train(build(), nnx.Param, corpus, options, cost)


def by_hand(options, corpus, tmp_path):
    """A loop of one's own: bare AdamW, and an Orbax checkpoint at its end."""
    fit = bare(options, corpus, MADE)
    ocp.save(tmp_path / "old", {"params": fit.params, "opt_state": fit.opt_state})
    return tmp_path / "old"


def bare(options, corpus, steps):
    graphdef, params, frozen = model.split(build())
    loss_fn = model.next_token_loss(graphdef)
    tx = optax.adamw(recipes.schedule(options), b1=options.b1, b2=options.b2, weight_decay=0.0)
    drawn = functools.partial(batch, options, corpus)
    return loop.fit(loss_fn, params, tx, drawn, steps, frozen=frozen)


def by_script(options, corpus, tmp_path):
    """The scripts without the guard, stopped half-way: here, a run that was to be no longer."""
    constant = dataclasses.replace(
        options, out=tmp_path / "old", optimizer="adamw", steps=MADE, schedule="constant"
    )
    train(constant, corpus)
    return tmp_path / "old"


def batch(options, corpus, index):
    shape = {"batch_size": options.batch_size, "length": options.length}
    return data.sample(corpus.train, options.seed, index, **shape)


@pytest.mark.parametrize(
    ("old_run", "schedule"),
    [(by_hand, "cosine"), *slowly((by_script, "constant"))],
    ids=["orbax", "run"],
)
def test_steps_batches_and_rate_go_on_where_the_old_run_was(
    old_run, schedule, options, corpus, tmp_path
):
    options = dataclasses.replace(options, schedule=schedule)
    old = old_run(options, corpus, tmp_path)
    options = dataclasses.replace(options, adopt=old)
    assert train(options, corpus).step == 20

    log = logs.history(options.out)
    assert log["step"].tolist() == list(range(MADE + 1, 21))
    expected = [float(recipes.schedule(options)(made)) for made in range(MADE, 20)]
    np.testing.assert_allclose(log["learning_rate"], expected, rtol=1e-5)

    # The first loss is that of the old parameters on the batch that came next.
    fit = bare(options, corpus, MADE + 1)
    np.testing.assert_allclose(log["loss"][0], fit.history["loss"][MADE], rtol=1e-4)

    shutil.rmtree(old)  # it is needed no more
    longer = dataclasses.replace(options, steps=24)
    if schedule == "constant":
        assert train(longer, corpus).step == 24
        assert logs.history(options.out)["step"].tolist() == list(range(MADE + 1, 25))


def test_the_count_is_the_optimizers_own():
    tx = lbw_optax.adamw(optax.constant_schedule(0.1))
    params = jnp.ones(3)
    state = tx.init(params)
    for made in range(3):
        assert adoption.updates(state) == made
        _, state = tx.update(jnp.ones(3), state, params, value=jnp.float32(1.0))


def missing(place):
    return place / "nowhere", "there is no such directory"


def no_checkpoint(place):
    (place / "text").mkdir()
    (place / "text" / "train.txt").write_text("text")
    return place / "text", "this is no Orbax checkpoint of"


def another_optimizer(place):
    _, params, _ = model.split(build())
    ocp.save(place / "sgd", {"params": params, "opt_state": optax.sgd(0.1).init(params)})
    return place / "sgd", "the state of this optimizer without the guard"


def another_model(place):
    params = {"w": jnp.ones(3)}
    state = optax.adamw(optax.constant_schedule(0.1)).init(params)
    ocp.save(place / "other", {"params": params, "opt_state": state})
    return place / "other", "of this model"


def nothing_saved(place):
    (place / "run-before").mkdir()
    (place / "run-before" / "journal.json").write_text('{"checkpoints": {}}')
    return place / "run-before", "the run there has saved nothing yet"


def as_long(place):
    """Of a run that made as many steps as are asked for."""
    _, params, _ = model.split(build())
    schedule = optax.constant_schedule(0.1)
    state = optax.tree.set(optax.adamw(schedule).init(params), count=jnp.int32(20))
    ocp.save(place / "long", {"params": params, "opt_state": state})
    return place / "long", "has made 20 steps: give more --steps"


CANNOT = [missing, no_checkpoint, another_optimizer, another_model, nothing_saved, as_long]


@pytest.mark.parametrize("make", CANNOT)
def test_what_cannot_be_adopted_is_named(make, options, corpus, tmp_path):
    old, said = make(tmp_path)
    with pytest.raises(ValueError, match=f"--adopt {old}.*{said}") as raised:
        train(dataclasses.replace(options, adopt=old), corpus)
    assert len(str(raised.value)) < 700
    assert not options.out.exists()  # so that the same directory can be given again


@pytest.mark.parametrize(
    "tx", [optax.adamw(0.1), optax.MultiSteps(optax.sgd(0.1), 2)], ids=["adamw", "MultiSteps"]
)
@pytest.mark.parametrize("jitted", [False, True])
def test_an_old_state_names_adopt(tx, jitted):
    params = jnp.ones(3)
    guarded = lbw_optax.lbw_guard(optax.with_extra_args_support(tx))
    update = jax.jit(guarded.update) if jitted else guarded.update
    with pytest.raises(ValueError, match=r"lbw_optax.adopt\(tx.init\(params\), state\)"):
        update(jnp.ones(3), tx.init(params), params)
    state = lbw_optax.adopt(guarded.init(params), tx.init(params))
    updates, _ = update(jnp.ones(3), state, params)
    assert np.isfinite(updates).all()

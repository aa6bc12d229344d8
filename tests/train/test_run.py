"""A run in this process, and what a fault in it leads to."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from small_model import SMALL

from train import data, logs, loop, model, run
from train.options import Options


def build():
    return model.Decoder(SMALL, rngs=nnx.Rngs(0))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight simulated ones; `test_train_bad_input` runs on all."""
    monkeypatch.setattr(run, "mesh", lambda options: None)


@pytest.fixture
def corpus():
    tokens = np.random.default_rng(0).integers(1, 9, size=4000).astype(np.int32)
    return data.Corpus(tokens, tokens[:600], tokens[-600:], tokenizer=None)


@pytest.fixture
def options(tmp_path):
    return Options(
        "small",
        tmp_path / "run",
        steps=40,
        batch_size=8,
        length=16,
        learning_rate=1e-2,
        dtype="float32",
        eval_every=10,
        save_every=5,
        max_distance=30,
        track=(),
    )


def trained(options, corpus):
    cost = run.announce(options, build, nnx.Param)
    return run.train(build(), nnx.Param, corpus, options, cost)


@pytest.fixture
def calls(monkeypatch):
    """The batches of all steps; the 25th leaves a NaN among the parameters."""
    step, calls = loop.train_step, []

    def faulty(*arguments):
        params, opt_state, metrics = step(*arguments)
        calls.append(np.asarray(arguments[5].tokens))
        if len(calls) == 25:
            params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
        return params, opt_state, metrics

    faulty.eval_shape = step.eval_shape
    monkeypatch.setattr(loop, "train_step", faulty)
    return calls


def test_a_fault_leads_to_a_rollback_that_is_told_and_logged(options, corpus, calls, capsys):
    result = trained(options, corpus)
    assert result.step == 40
    assert np.isfinite(result.perplexity["test"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(result.decoder)))

    (rollback,) = json.loads((options.out / "journal.json").read_text())["rollbacks"]
    assert rollback["from_step"] - rollback["to_step"] <= 30
    assert f"rolled back from step {rollback['from_step']} to" in capsys.readouterr().err
    lines = [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert len(steps) == len(calls) == 40 + rollback["from_step"] - rollback["to_step"]
    assert np.isfinite(logs.history(options.out)["loss"]).all()
    actions = [
        json.loads(x)["action"] for x in (options.out / "events.jsonl").read_text().splitlines()
    ]
    assert actions.count("rollback") == 1
    # No batch is used twice.
    assert len({batch.tobytes() for batch in calls}) == len(calls)


def test_without_a_guard_nothing_is_done_about_it(options, corpus, calls):
    result = trained(dataclasses.replace(options, optimizer="adamw"), corpus)
    assert len(calls) == 40
    assert np.isnan(result.perplexity["test"])
    assert np.isnan(logs.history(options.out)["loss"][25:]).all()
    assert json.loads((options.out / "result.json").read_text())["perplexity"]["test"] is None


def test_the_whole_of_each_split_is_measured(options, corpus):
    result = trained(dataclasses.replace(options, steps=2, learning_rate=1e-9), corpus)
    _, params, frozen = model.split(result.decoder)
    graphdef, _, _ = model.split(build())
    for split in ("valid", "test"):
        tokens, total, count = getattr(corpus, split), 0.0, 0
        for start in range(0, len(tokens) - 1, 16):
            window = tokens[start : start + 17]
            logits = np.asarray(nnx.merge(graphdef, params, frozen)(window[None, :-1]), np.float64)[
                0
            ]
            wanted = logits[np.arange(len(window) - 1), window[1:]]
            total += (np.log(np.exp(logits).sum(-1)) - wanted).sum()
            count += len(window) - 1
        assert count == 599
        assert result.perplexity[split] == pytest.approx(np.exp(total / count), rel=1e-4)

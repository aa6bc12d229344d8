"""A run in this process, and what a fault in it leads to."""

import dataclasses
import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'lbw_optax[rollback]'")

from jax.sharding import AxisType
from receiver import SECRET, Receiver
from small_model import SMALL
from support import assert_same_bits

import lbw_optax
from lbw_optax import orders
from lbw_optax.exporters import webhook
from train import data, jsonl, logs, loop, model, run, sharding
from train.options import Options
from train.progress import Progress
from train.watch import Watch

pytestmark = pytest.mark.process


def build(scan=False):
    return model.Decoder(SMALL, rngs=nnx.Rngs(0), scan=scan)


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
        save_every=25,
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
            scale = params["norm"]["scale"]
            params["norm"]["scale"] = jax.device_put(scale.at[3].set(jnp.nan), scale.sharding)
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
    said = capsys.readouterr().err
    assert f"rolled back from step {rollback['from_step']} to" in said
    assert "copies in host memory every 7 steps (" in said
    lines = [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert len(steps) == len(calls) == 40 + rollback["from_step"] - rollback["to_step"]
    assert np.isfinite(logs.history(options.out)["loss"]).all()
    assert [lines[0][f"rollback_{name}"] for name in ("snapshot_every", "device_bytes")] == [7, 0]
    assert not any("rollback_host_bytes" in line for line in lines[1:])  # nothing has changed
    assert {line["step"] for line in lines if "gradient_log2" in line} == {10, 20, 30, 40}
    actions = [
        json.loads(x)["action"] for x in (options.out / "events.jsonl").read_text().splitlines()
    ]
    assert actions.count("rollback") == 1
    assert f"report     {options.out / 'report.html'}" in said
    page = (options.out / "report.html").read_text(encoding="utf-8")
    undone = rollback["from_step"] - rollback["to_step"]
    assert f"went back once, over {undone} steps, because the parameters are broken" in page
    assert f"<td>{undone:,}</td>" in page
    # No batch is used twice.
    assert len({batch.tobytes() for batch in calls}) == len(calls)

    on_a_mesh_it_is_the_same(options, corpus, calls)


def on_a_mesh_it_is_the_same(options, corpus, calls):
    """On four devices along (fsdp, tensor), with decisions, batches and rollback."""
    calls_alone = list(calls)
    calls.clear()
    spread = dataclasses.replace(options, out=options.out.parent / "mesh")
    four, kinds = jax.devices()[:4], (AxisType.Auto,) * 4
    names = (*sharding.ROWS, "tensor")
    mesh = jax.make_mesh((1, 2, 1, 2), names, axis_types=kinds, devices=four)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "mesh", lambda options: mesh)
        result = trained(spread, corpus)
    kernel = result.decoder.layers[0].mlp.up_proj.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (16, 32)
    np.testing.assert_array_equal(calls, calls_alone)
    journals = [json.loads((o.out / "journal.json").read_text()) for o in (spread, options)]
    assert journals[0]["rollbacks"] == journals[1]["rollbacks"]
    found, expected = logs.history(spread.out), logs.history(options.out)
    for decision in ("step", "regime", "skips"):
        np.testing.assert_array_equal(found[decision], expected[decision], err_msg=decision)
    for number in ("loss", "scale", "gradient_norm"):
        np.testing.assert_allclose(found[number], expected[number], rtol=1e-3, err_msg=number)


def test_alerts_and_metrics_go_where_they_are_sent_and_nobody_there_changes_nothing(
    options, corpus, calls, monkeypatch, caplog
):
    monkeypatch.setattr(webhook, "PAUSE", 0.01)
    losses = []
    with Receiver() as receiver:
        for name in ("up", "down"):
            calls.clear()
            places = {"alert_webhook": receiver.url, "prometheus": options.out.parent / "mine.prom"}
            told = dataclasses.replace(options, steps=30, out=options.out.parent / name, **places)
            run.check(told)
            trained(told, corpus)
            losses.append(logs.history(told.out)["loss"])
            receiver.close()
    np.testing.assert_array_equal(*losses)
    (back,) = [x for x in receiver.bodies if x["event"]["action"] == "rollback"]
    assert "because the parameters are broken" in back["text"]
    assert "could not be delivered to 127.0.0.1" in caplog.text
    metrics = (options.out.parent / "mine.prom").read_text()
    assert 'lbw_step{run="down"} 30.0' in metrics
    assert "lbw_scale" in metrics
    files = [path for path in told.out.rglob("*") if path.suffix in (".json", ".jsonl", ".html")]
    assert len(files) > 4
    assert not any(SECRET in path.read_text() for path in files)


def test_a_run_that_the_guard_gives_up_is_told_before_it_ends(options):
    with Receiver() as receiver:
        told = dataclasses.replace(options, alert_webhook=receiver.url)
        cost = run.announce(told, build, nnx.Param)
        told.out.mkdir()
        with pytest.raises(lbw_optax.GuardExhausted), Watch(told, cost):
            raise lbw_optax.GuardExhausted("30 skipped in a row")
    (body,) = receiver.bodies
    assert (body["level"], body["text"]) == ("error", "30 skipped in a row")


@pytest.mark.parametrize("scan", [False, True], ids=["list", "scan"])
def test_attention_logits_stay_at_their_limit_and_what_was_done_is_logged(options, corpus, scan):
    """Beside what a step adds; and the stable ranks of all layers are in the log."""

    def with_large_logits():
        made = build(scan)
        attention = (made.layers if scan else made.layers[0]).self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.kernel[...] *= 30
        return made

    limit = 1.0
    asked = {"qk_clip": limit, "scan": scan, "learning_rate": 1e-3, "steps": 20, "eval_every": 0}
    options = dataclasses.replace(options, **asked)
    cost = run.announce(options, with_large_logits, nnx.Param)
    run.train(with_large_logits(), nnx.Param, corpus, options, cost)
    seen = logs.history(options.out)
    assert seen["attention_logit"][0] > 2 * limit
    assert seen["attention_logit"][1:].max() < 1.3 * limit
    assert (np.diff(seen["qk_clips"]) >= 0).all()
    assert seen["qk_clips"][0] > 0
    lines = jsonl.read(options.out / "log.jsonl")
    ranks = {line["step"]: line["stable_ranks"] for line in lines if "stable_ranks" in line}
    assert list(ranks) == [1]
    assert len(ranks[1]) == SMALL.num_hidden_layers
    assert all(1 <= x < SMALL.head_dim * SMALL.num_key_value_heads for x in ranks[1])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"alert_webhook": "chat.example"}, "--alert-webhook: url must begin with http:// or"),
        ({"prometheus": Path("mine.txt")}, r"--prometheus: The textfile collector reads \*.prom"),
    ],
)
def test_a_receiver_that_is_none_is_refused_before_anything_is_made(option, sentence, options):
    with pytest.raises(ValueError, match=sentence):
        run.check(dataclasses.replace(options, **option))
    assert not options.out.exists()


def test_what_is_ordered_of_a_run_is_done_within_ten_steps_and_logged(options, corpus, monkeypatch):
    step, asked = loop.train_step, iter(range(1, 100))

    def ordering(*arguments):
        if next(asked) == 12:
            orders.give(options.out, "hold", 0.25)
        return step(*arguments)

    ordering.eval_shape = step.eval_shape
    monkeypatch.setattr(loop, "train_step", ordering)
    trained(dataclasses.replace(options, steps=24, eval_every=0), corpus)
    scale = logs.history(options.out)["scale"]
    assert (scale[22:] == 0.25).all()
    assert (scale[:11] != 0.25).all()
    lines = [json.loads(x) for x in (options.out / "events.jsonl").read_text().splitlines()]
    (ordered,) = [line for line in lines if line["action"] == "order"]
    assert 12 <= ordered["step"] < 22
    assert (ordered["order"], ordered["scale"]) == ("hold", 0.25)
    page = (options.out / "report.html").read_text(encoding="utf-8")
    assert f"A person gave an order at step {ordered['step']}" in page
    assert "too high" not in page


def test_without_a_guard_nothing_is_done_about_it(options, corpus, calls):
    with pytest.warns(RuntimeWarning, match=r"none to go back to, for a NaN in 0\.norm\.scale"):
        result = trained(dataclasses.replace(options, optimizer="adamw"), corpus)
    assert len(calls) == 40
    assert np.isnan(result.perplexity["test"])
    assert np.isnan(logs.history(options.out)["loss"][25:]).all()
    assert json.loads((options.out / "result.json").read_text())["perplexity"]["test"] is None


def test_the_whole_of_each_split_is_measured_or_so_much_of_it_as_is_asked_for(options, corpus):
    whole = dataclasses.replace(options, steps=2, learning_rate=1e-9)
    result = trained(whole, corpus)
    _, params, frozen = model.split(result.decoder)
    graphdef, _, _ = model.split(build())
    for split in ("valid", "test"):
        tokens, total, count = getattr(corpus, split), 0.0, 0
        full = len(tokens) // 16
        rows = np.stack([tokens[16 * i : 16 * i + 17] for i in range(full)])
        for windows in (rows, tokens[None, 16 * full :]):
            found = nnx.merge(graphdef, params, frozen)(windows[:, :-1])
            logits, targets = np.asarray(found, np.float64), windows[:, 1:, None]
            wanted = np.take_along_axis(logits, targets, axis=-1)[..., 0]
            total += (np.log(np.exp(logits).sum(-1)) - wanted).sum()
            count += targets.size
        assert count == 599
        assert result.perplexity[split] == pytest.approx(np.exp(total / count), rel=1e-4)

    # The same run again, at its end.
    bounded = trained(dataclasses.replace(whole, final_eval_targets=256), corpus)
    assert bounded.targets == {"valid": 256, "test": 256}
    document = json.loads((options.out / "result.json").read_text())
    assert document["targets"] == bounded.targets
    windows = data.windows(corpus.test, batch_size=8, length=16, limit=256)
    expected = loop.perplexity(model.next_token_loss(graphdef), params, windows, frozen=frozen)
    assert bounded.perplexity["test"] == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_with_other_microbatches_and_more_steps(options, corpus, capsys):
    """What changes rounding alone leaves the losses where they are, and is told."""
    same = {"schedule": "constant", "warmup": 0.0, "eval_every": 0, "learning_rate": 1e-3}
    first = dataclasses.replace(options, steps=8, **same)
    trained(first, corpus)
    other = {"microbatches": 4, "remat": True, "loss_chunk": 8, "save_every": 7, "eval_every": 6}
    longer = dataclasses.replace(first, steps=16, **{**same, **other})
    run.check(longer)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{options.out} goes on with other options: eval_every is 6, was 0; ")
    for changed in ("microbatches is 4, was 1", "remat is True, was False", "steps is 16, was 8"):
        assert changed in said
    assert trained(longer, corpus).step == 16

    whole = dataclasses.replace(first, steps=16, out=options.out.parent / "whole")
    trained(whole, corpus)
    found, expected = logs.history(longer.out), logs.history(whole.out)
    assert found["step"].tolist() == list(range(1, 17))
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)
    assert np.isfinite(found["valid_perplexity"]).nonzero()[0].tolist() == [7, 11, 15]


def test_stopped_and_run_again_it_ends_bitwise_as_the_uninterrupted_run(
    options, corpus, monkeypatch
):
    whole = dataclasses.replace(options, steps=20, out=options.out.parent / "whole")
    expected = trained(whole, corpus)
    step, made = loop.train_step, []

    def interrupted(*arguments):
        made.append(None)
        if len(made) == 13:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    interrupted.eval_shape = step.eval_shape
    parts = dataclasses.replace(whole, out=options.out)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        assert trained(parts, corpus).step == 13
    found = trained(parts, corpus)
    assert_same_bits(nnx.state(found.decoder), nnx.state(expected.decoder))
    assert found.perplexity == expected.perplexity
    logged, wanted = logs.history(parts.out), logs.history(whole.out)
    for metric in ("step", "loss", "scale", "gradient_norm", "regime"):
        np.testing.assert_array_equal(logged[metric], wanted[metric], err_msg=metric)


def test_ctrl_c_while_the_result_is_saved_waits_for_it(options, corpus, capfd):
    short = dataclasses.replace(options, steps=3, eval_every=0)
    cost = run.announce(short, build, nnx.Param)

    def save(decoder):
        signal.raise_signal(signal.SIGINT)

    assert run.train(build(), nnx.Param, corpus, short, cost, save=save).finished
    assert (options.out / "result.json").exists()
    assert "stopping after this step" in capfd.readouterr().err


def test_a_run_that_is_asked_to_stop_in_an_evaluation_is_saved_and_not_finished(
    options, corpus, monkeypatch, capsys
):
    """A signal of the process's own, at the second batch of the test split."""
    short = dataclasses.replace(options, steps=3, eval_every=0)
    shown = Progress.batches

    def batches(self, name, windows):
        for i, batch in enumerate(shown(self, name, windows)):
            if name == "test split" and i == 1:
                signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "batches", batches)
        result = trained(short, corpus)
    assert (result.step, result.finished) == (3, False)
    assert not (options.out / "result.json").exists()
    assert "stopped after step 3, and saved" in capsys.readouterr().err
    assert trained(short, corpus).finished
    assert logs.history(options.out)["step"].tolist() == [1, 2, 3]

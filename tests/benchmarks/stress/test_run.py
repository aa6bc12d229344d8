"""The stress benchmark end to end on a tiny model: it trains, resumes, and refuses bad names."""

import itertools
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import support
from support import refused

from benchmarks import records
from benchmarks.stress import bench, methods, regimes, tables
from benchmarks.stress import run as stress
from benchmarks.stress.pace import share_of_steps
from lbw_optax.law import control
from train import data, jsonl, loop, model

pytestmark = pytest.mark.process

TINY = regimes.SIZES["quick"]._replace(
    name="tiny",
    config=model.Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    ),
    length=16,
    batch_size=4,
    base_steps=40,
    steps={"lora": 50, "full": 50, "scratch": 50, "recipe": 50},
    evaluated=512,
    curve_windows=4,
    rank=2,
)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A corpus, and caches that are not the user's."""
    root = tmp_path_factory.mktemp("stress")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    draw = random.Random(0)
    (root / "corpus").mkdir()
    for split, length in (("train", 8000), ("valid", 400), ("test", 400)):
        text = " ".join(draw.choices(words, weights=range(1, 7), k=length))
        (root / "corpus" / f"{split}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBW_CACHE", str(root / "cache"))
        patch.setattr(bench, "RUNS", root / "runs")
        patch.setitem(regimes.SIZES, "quick", TINY)
        # The whole library would be tokenised in each fresh cache; a little of it is enough.
        patch.setattr(data, "standard_library", lambda: {"train": ["import os\n" * 200]})
        yield root


@pytest.fixture(scope="module")
def ready(place):
    return bench.prepare(place / "corpus", TINY)


def test_a_cell_is_the_run_of_the_training_loop(ready):
    """The compiled run of `run_cell` against `train.loop.fit`, step by step on the host."""
    regime, seed, lr = regimes.REGIMES["recipe"], 1, 0.01
    cell = regimes.run_cell(ready, regime, methods.adamw, lr, seed)
    params, frozen = bench.start(ready, seed, from_base=False, adapters=False)
    schedule = optax.warmup_cosine_decay_schedule(lr / 5, lr, 5, 50)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )
    loss_fn = ready.losses[False]

    def batch(step):
        return data.sample(ready.tokens["scratch"], seed, step, batch_size=4, length=16)

    fit = loop.fit(loss_fn, params, tx, batch, 50, frozen=frozen)
    np.testing.assert_allclose(
        cell["train_curve"], fit.history["loss"].reshape(25, 2).mean(1), rtol=1e-4
    )
    test = loop.perplexity(loss_fn, fit.params, ready.held_out["test"], frozen=frozen)
    assert cell["perplexity"]["test"] == pytest.approx(test, rel=1e-4)
    assert cell["valid_curve"][-1] == pytest.approx(
        float(loss_fn(fit.params, frozen, ready.curve)), rel=1e-4
    )


def test_only_adapters_are_trained_and_they_start_at_the_base(ready):
    lora, full = regimes.REGIMES["lora"], regimes.REGIMES["full"]
    trained, frozen = bench.start(ready, 3, from_base=True, adapters=True)
    count = sum(leaf.size for leaf in leaves(trained))
    assert count < 0.5 * sum(leaf.size for leaf in leaves(frozen))
    before = regimes.perplexity_before(ready, lora, 3)
    assert before == pytest.approx(regimes.perplexity_before(ready, full, 0), rel=1e-5)
    scratch = regimes.perplexity_before(ready, regimes.REGIMES["scratch"], 0)
    assert before["valid"] < scratch["valid"]


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_the_base_is_trained_once(place, ready, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("the base was trained again"))
    again = bench.prepare(place / "corpus", TINY)
    for one, other in zip(leaves(ready.base), leaves(again.base), strict=True):
        np.testing.assert_array_equal(one, other)


def test_fine_tuning_reads_what_the_base_has_not(ready):
    train = ready.tokens["scratch"]
    tenth = len(train) // 10
    np.testing.assert_array_equal(ready.tokens["finetune"], train[tenth:])
    np.testing.assert_array_equal(ready.tokens["pretrain"][:tenth], train[:tenth])


ARGUMENTS = "--quick --regimes lora --methods adamw prodigy guard --lrs 1 10 --seeds 0 1"


def run(place, out, arguments=ARGUMENTS):
    stress.main([*arguments.split(), "--data-dir", str(place / "corpus"), "--out", str(out)])
    return records.read(out)


@pytest.fixture(scope="module")
def finished(place, ready):
    return run(place, place / "results.jsonl")


def test_every_cell_is_there_once_with_its_facts(finished):
    grid = [record for record in finished if record["tuned"] is not None]
    cells = {(r["method"], r["lr"] and round(r["lr"] / r["tuned"]), r["seed"]) for r in grid}
    rated = itertools.product(["adamw", "guard"], [1, 10], [0, 1])
    free = itertools.product(["prodigy"], [None], [0, 1])
    assert cells | {("adamw", 1, 0)} == {*rated, *free}  # that one is from the tuning
    assert len({facts(record) for record in finished}) == len(finished)
    for record in finished:
        assert {"commit", "dirty", "versions", "machine"} < set(record)
        assert record["data"] == "corpus"
        assert record["steps"] == 50
        if record["method"] == "adamw":
            assert len(record["valid_curve"]) == 25
        else:
            assert record["pace"] is None or record["pace"] > 0
        guarded = record["method"] == "guard"
        assert (record["guard"] is not None) == guarded
        assert record["law"] == (control.LAW if guarded else None)


def facts(record):
    return tuple(record[name] for name in stress.cell_of("lora", "adamw", 0.1, 0, 50))


def test_a_pace_is_that_of_the_curves(ready, finished):
    """Of the run's own curve against that of AdamW at the tuned rate with the same seed."""
    found = next(r for r in finished if (r["method"], r["seed"]) == ("guard", 1))
    (bare,) = [
        r for r in finished if (r["method"], r["lr"], r["seed"]) == ("adamw", found["tuned"], 1)
    ]
    regime, build = regimes.REGIMES["lora"], methods.METHODS["guard"].build
    curve = regimes.run_cell(ready, regime, build, found["lr"], 1)["valid_curve"]
    expected = share_of_steps(curve, bare["valid_curve"])
    assert (math.inf if found["pace"] is None else found["pace"]) == pytest.approx(expected, 1e-2)


def test_the_reference_is_run_before_what_is_compared_with_it(place, finished, monkeypatch):
    out = place / "reference.jsonl"
    tuning = [r for r in finished if r["tuned"] is None]
    for record in tuning:
        jsonl.append(out, record)
    new = run(place, out, "--quick --regimes lora --methods prodigy --seeds 1")[len(tuning) :]
    assert [(r["method"], r["seed"]) for r in new] == [("adamw", 1), ("prodigy", 1)]
    assert new[0]["lr"] == new[0]["tuned"]


def test_the_tuned_rate_is_the_best_of_its_neighbours_on_valid(finished):
    (rate,) = {record["tuned"] for record in finished} - {None}
    tried = {
        record["lr"]: record["perplexity"]["valid"]
        for record in finished
        if (record["method"], record["seed"]) == ("adamw", 0)
    }
    near = [lr for lr in tried if 0.3 < lr / rate < 3.5]
    assert len(near) == 3
    assert tried[rate] == min(tried[lr] for lr in near)


def test_a_second_run_runs_nothing(place, finished, monkeypatch, capsys):
    monkeypatch.setattr(stress, "run_cell", lambda *_, **__: pytest.fail("a cell was run again"))
    assert run(place, place / "results.jsonl") == finished
    assert "0 to run" in capsys.readouterr().err


def test_a_torn_line_is_run_again(place, finished, capsys):
    out = place / "torn.jsonl"
    whole = (place / "results.jsonl").read_bytes()
    out.write_bytes(whole[:-100])
    again = run(place, out)
    assert "1 to run" in capsys.readouterr().err
    assert again[:-1] == finished[:-1]
    assert again[-1]["perplexity"] == pytest.approx(finished[-1]["perplexity"], rel=1e-6)


def test_tables_and_figure_come_from_the_result_file(place, finished):
    out = place / "STRESS.md"
    tables.main(["--results", str(place / "results.jsonl"), "--out", str(out)])
    text = out.read_text()
    assert "## LoRA" in text
    assert "| Prodigy |" in text
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_tables_have_the_long_runs_when_there_are_any(place, finished):
    results, out = place / "some.jsonl", place / "SOME.md"
    jsonl.append(results, finished[0] | {"tuned": finished[0]["lr"]})
    tables.main(["--results", str(results), "--out", str(out)])
    assert "5 times as many steps" not in out.read_text()
    jsonl.append(stress.long_results(results), finished[0])  # killed while it was tuning
    tables.main(["--results", str(results), "--out", str(out)])
    assert "5 times as many steps" not in out.read_text()
    for record in (r for r in finished if r["method"] == "adamw"):  # and before the guard's turn
        jsonl.append(stress.long_results(results), record)
    tables.main(["--results", str(results), "--out", str(out)])
    assert "| LoRA | 50 |" in out.read_text().split("5 times")[1]
    for record in finished:
        jsonl.append(stress.long_results(results), record)
    tables.main(["--results", str(results), "--out", str(out)])
    (row,) = [line for line in out.read_text().split("5 times")[1].splitlines() if "LoRA" in line]
    name, steps, _, at_tuned, *_ = [field.strip() for field in row.strip("|").split("|")]
    grid = tables.load(finished, "test")
    assert (name, steps) == ("LoRA", "50")
    assert float(at_tuned) == pytest.approx(tables.ratio(grid, "lora", "guard", 1), abs=1e-3)


SCRIPT = """
import sys
from pathlib import Path
from benchmarks.stress import bench, regimes
from benchmarks.stress import run as stress
from train import data

sys.path[:0] = sys.argv[1:3]
import test_run

regimes.SIZES["quick"] = test_run.TINY
bench.RUNS = Path(sys.argv[3]) / "runs"
data.standard_library = lambda: {"train": ["import os\\n" * 200]}
stress.main(sys.argv[4:])
"""


def test_a_killed_process_is_continued(place, ready, tmp_path):
    out = tmp_path / "results.jsonl"
    arguments = ["--quick", "--regimes", "recipe", "--methods", "adamw", "--out", str(out)]
    arguments += ["--data-dir", str(place / "corpus"), "--seeds", *"01234"]
    here = Path(__file__).parent
    folders = [here, Path(support.__file__).parent, place]
    command = [sys.executable, "-c", SCRIPT, *map(str, folders), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = (line for line in process.stderr if "min left" in line)
        list(itertools.islice(lines, 2))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = records.read(out)
    stress.main(arguments)
    after = records.read(out)
    assert after[: len(left)] == left
    assert len(tables.load(after, "test").cells) == 10
    assert len({facts(record) for record in after}) == len(after)


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ("--methods gard", "'gard': did you mean guard"),
        ("--methods adamw nonsense", "'nonsense': choose from "),
        ("--regimes LoRa", "'LoRa': did you mean lora"),
        ("--lrs 31", "'31': did you mean 3"),
    ],
)
def test_a_wrong_name_gets_one_sentence_with_the_near_ones(arguments, near, capsys):
    assert near in refused(stress.main, arguments.split(), capsys)


def test_a_missing_directory_gets_one_sentence(tmp_path, capsys):
    refused(stress.main, ["--data-dir", str(tmp_path / "nowhere")], capsys)


@pytest.mark.parametrize("best", [3e-5, 0.9e-3, 2e-2])
def test_tuning_finds_the_valley_from_its_guess(best):
    tried = []

    def loss(lr):
        tried.append(lr)
        return abs(math.log(lr / best)) if lr < 0.1 else math.inf

    found = stress.tune(loss, "scratch")
    assert found == min(set(tried), key=loss)
    assert 0.6 < found / best < 1.7

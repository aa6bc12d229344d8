"""Tables and figure of the fault benchmark, from made-up records."""

import math

import pytest

from benchmarks.faults import tables
from benchmarks.faults.methods import METHODS, SCENARIOS
from train import jsonl

FACTS = {
    "data": "text",
    "model": {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 512},
    "length": 32,
    "batch_size": 8,
    "rate": 0.003,
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {"jax": "0.10.2"},
    "machine": "a machine",
    "law": "a law",
}


def record(part, scenario, method, seed, survived=True, **details):
    run = {
        "ratio": 1.0 if survived else None,
        "survived": survived,
        "nonfinite": not survived,
        "recovery": [3 if survived else None],
        "lost": 4,
        "steps": 500 if part == "mix" else 300,
        "steps_done": 500 if part == "mix" else 300,
        "interventions": 2,
        "rollbacks": [],
        "reasons": [],
        "exhausted": False,
        "curve": [1.0] * 20 + [1.2 if survived else None] * 40,
        "kinds": ["nan_gradient"],
    }
    cell = {"part": part, "scenario": scenario, "method": method, "seed": seed}
    return {**cell, **run, **FACTS, **details}


def records():
    ours, cells = "guard-rollback", []
    for seed in range(4):
        cells.append(record("grid", "nan-gradient", "adamw", seed, survived=False))
        cells.append(record("grid", "nan-loss", "adamw", seed, recovery=[0]))
        cells.append(record("grid", "nan-gradient", ours, seed, rollbacks=[7 + seed]))
        cells.append(record("grid", "nan-loss", ours, seed, survived=seed > 0, recovery=[100]))
        cells.append(record("mix", "mix", "adamw", seed, survived=seed > 1))
        cells.append(record("mix", "mix", ours, seed, rollbacks=[30] * (seed == 3)))
    cells.append(record("calm", "none", ours, 0, steps=10_000, interventions=2))
    return cells


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [entry.strip() for entry in line[1:]] for line in lines}


def test_a_table_never_mixes_two_laws():
    """An older law's cell that the newer one has not run is not there; peers have no law."""
    older = [record("grid", "nan-gradient", "guard", seed, law="older") for seed in (0, 1)]
    newer = [record("grid", "nan-gradient", "guard", 1, law="newer")]
    peers = [record("grid", "nan-gradient", "adamw", 0, law=None)]
    grid = tables.load(older + peers + newer).grid
    assert {key: len(found) for key, found in grid.items()} == {
        ("nan-gradient", "guard"): 1,
        ("nan-gradient", "adamw"): 1,
    }


def test_targets():
    measured = {t.title: t.measured for t in tables.targets(tables.load(records()))}
    assert measured == {
        "crashes in the mix, against AdamW": "−100.0 % (0 for 2, in 2 k steps)",
        "median steps to recover": "3 (faults that AdamW does not survive)",
        # Four steps lost in each of four episodes, for two crashes.
        "compute wasted per crash": "−96.8 % (8.0 steps for 250)",
        "false interventions per 1000 steps": "0.20",
        "rollback distance": "median 9, at most 30 (5 rollbacks)",
        "NaN in parameters or optimizer state": "in 1 of 12 runs",
        "state lost after SIGKILL at a random moment": "see the tests of processes",
    }


def test_a_crash_of_the_guard_costs_a_restart():
    cells = [record("mix", "mix", "adamw", 0, survived=False)]
    cells.append(record("mix", "mix", "guard-rollback", 0, survived=False, lost=10))
    assert tables.waste(tables.load(cells), "guard-rollback") == 260


def test_the_newest_record_of_a_cell_counts():
    cells = [*records(), record("grid", "nan-loss", "adamw", 0, survived=False)]
    table = rows(tables.survival_table(tables.load(cells)))
    assert table[SCENARIOS["nan-loss"].title] == ["3/4", "3/4"]


def test_recovery_is_a_median_and_never_is_beyond_every_number():
    results = tables.load(records())
    table = rows(tables.recovery_table(results))
    assert table[SCENARIOS["nan-gradient"].title] == ["–", "3"]
    assert table[SCENARIOS["nan-loss"].title] == ["0", "100"]
    assert tables.recoveries({"survived": False, "recovery": [0, None]}) == [math.inf] * 2
    assert math.isnan(tables.survival(results, "flip-mu", "adamw"))


def test_what_the_guard_does_not_survive_is_said():
    said = tables.losses(tables.load(records()))
    assert "- NaN loss: 1 of 4 lost" in said
    assert "one gradient leaf" not in said


def test_command_writes_page_and_figure(tmp_path, capsys):
    file, page = tmp_path / "faults.jsonl", tmp_path / "FAULTS.md"
    for line in records():
        jsonl.append(file, line)
    tables.main(["--results", str(file), "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    for part in ("# Fault benchmark", "## Targets", "## The mix", "## Without a fault"):
        assert part in text
    for method in ("adamw", "guard-rollback"):
        assert METHODS[method].title in text
    assert (tmp_path / "FAULTS.png").stat().st_size > 10_000


def test_without_results_there_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tables.main(["--results", str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2
    assert "run python -m benchmarks.faults first" in capsys.readouterr().err

"""Tables and figure of the fault benchmark, from made-up records."""

import math

import pytest

from benchmarks.faults import figure, results, tables, targets
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
    newer = [record("grid", "nan-gradient", "guard", seed, law="newer") for seed in (1, 2)]
    peers = [record("grid", "nan-gradient", "adamw", seed, law=None) for seed in (0, 1, 2)]
    grid = results.load(older + peers + newer).grid
    assert {key: [r["seed"] for r in found] for key, found in grid.items()} == {
        ("nan-gradient", "guard"): [1, 2],
        ("nan-gradient", "adamw"): [1, 2],
    }


@pytest.mark.parametrize("part", ["grid", "calm", "mix"])
def test_methods_of_one_table_have_the_same_seeds(part):
    scenario = {"grid": "nan-loss", "calm": "none", "mix": "mix"}[part]
    seeds = {"adamw": (3, 0, 1, 2), "guard": (2, 3, 4), "guard-rollback": (9, 3, 2)}
    lines = [record(part, scenario, name, seed) for name, found in seeds.items() for seed in found]
    of_part = getattr(results.load(lines), part)
    assert len(of_part) == len(seeds)
    for found in of_part.values():
        runs = found.values() if isinstance(found, dict) else found
        assert [r["seed"] for r in runs] == [2, 3]


def test_methods_without_a_common_seed_have_no_row():
    lines = [record("grid", "nan-loss", name, seed) for seed, name in enumerate(("adamw", "guard"))]
    assert results.load(lines).grid == {}


def test_targets():
    measured = {t.title: t.measured for t in targets.targets(results.load(records()))}
    assert measured == {
        "crashes in the mix, against AdamW": "−100.0 % (0 for 2, in 2 k steps)",
        "median steps to recover": "3 (faults that AdamW does not survive)",
        # Four steps lost in each of four episodes, for two crashes.
        "compute wasted per crash": "−96.8 % (8.0 steps for 250, which are assumed)",
        "false interventions per 1000 steps": "0.20 (2 in 1 run of 10000 steps: "
        "0.02 to 0.72 with 95 % confidence)",
        "rollback distance": "median 9, at most 30 (5 rollbacks)",
        "NaN in parameters or optimizer state": "in 1 of 12 runs",
        "state lost after SIGKILL at a random moment": "see the tests of processes",
    }


def test_a_crash_of_the_guard_costs_a_restart():
    cells = [record("mix", "mix", "adamw", 0, survived=False)]
    cells.append(record("mix", "mix", "guard-rollback", 0, survived=False, lost=10))
    assert results.waste(results.load(cells), "guard-rollback") == 260


def test_the_newest_record_of_a_cell_counts():
    cells = [*records(), record("grid", "nan-loss", "adamw", 0, survived=False)]
    table = rows(tables.survival_table(results.load(cells)))
    assert table[SCENARIOS["nan-loss"].title] == ["3/4", "3/4"]


def test_recovery_is_a_median_and_never_is_beyond_every_number():
    found = results.load(records())
    table = rows(tables.recovery_table(found))
    assert table[SCENARIOS["nan-gradient"].title] == ["–", "3"]
    assert table[SCENARIOS["nan-loss"].title] == ["0", "100"]
    assert results.recoveries({"survived": False, "recovery": [0, None]}) == [math.inf] * 2
    assert math.isnan(results.survival(found, "flip-mu", "adamw"))


def test_what_the_guard_does_not_survive_is_said():
    said = tables.losses(results.load(records()))
    assert "- NaN loss: 1 of 4 lost" in said
    assert "one gradient leaf" not in said


def test_where_a_guard_is_worse_than_adamw_is_said():
    found = results.load(records())
    ours = "guard + rollback, NaN loss: 3 of 4 survive, of AdamW 4 of 4"
    assert tables.worse_than_adamw(found).splitlines()[2:] == [f"- {ours}"]
    assert "- NaN loss: AdamW 4 of 4, 3 of 4" in tables.won_by_others(found)
    better = [r for r in records() if r["scenario"] != "nan-loss"]
    assert "- nowhere" in tables.worse_than_adamw(results.load(better))
    assert "- nowhere" in tables.won_by_others(results.load(better))


def test_what_a_crash_is_taken_to_cost_is_said():
    """Eight steps are wasted per crash of AdamW, whatever that crash costs."""
    said = tables.restarts(results.load(records()))
    assert "is an assumption" in said
    for share, steps in (("−97 %", 250), ("−92 %", 100), ("−84 %", 50)):
        assert f"{share} if a crash costs {steps} steps" in said


def test_the_calm_table_says_how_much_stands_behind_it():
    lines = [
        record("calm", "none", "guard", seed, steps=10_000, interventions=1) for seed in (0, 2)
    ]
    table = rows(tables.calm_table(results.load(lines)))
    assert table["guard"] == ["2", "0, 2", "20000", "2", "0.10"]


@pytest.mark.parametrize("events", [0, 1, 4])
def test_the_interval_is_where_the_events_are_not_unlikely(events):
    """At its ends so many events, or more extreme ones, have a probability of 2.5 %."""
    low, high = targets.poisson_interval(events)

    def at_most(mean, count):
        return sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count + 1))

    assert at_most(high, events) == pytest.approx(0.025)
    if events:
        assert 1 - at_most(low, events - 1) == pytest.approx(0.025)
    else:
        assert low == 0


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


def test_no_curve_fails_before_the_fault():
    """The point that is stored first after step 100 began is one step after the fault."""
    curves = [[1.0] * 20 + [None] * 40, [1.0] * 20 + [None] * 40, [1.0] * 60]
    steps, heights = figure.since_the_fault(curves)
    assert (heights[steps <= 0] == 1).all()
    assert math.isnan(heights[steps == 1][0])
    assert steps[:2].tolist() == [-99, -94]

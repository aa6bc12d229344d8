"""What records share stands once in a result file, and the files in git are found again whole."""

import json
import multiprocessing
import subprocess
from pathlib import Path

import pytest

from benchmarks import generality, records, sensitivity
from benchmarks.atlas import run as atlas
from benchmarks.faults import cells as faults
from benchmarks.runner import Book
from benchmarks.stress import run as stress
from benchmarks.stress.regimes import REGIMES, SIZES
from train import jsonl

RESULTS = Path(stress.RESULTS).parent


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def test_a_setting_stands_once_before_its_first_record(path):
    here, there = {"data": "text", "commit": "a"}, {"data": "text", "commit": "b"}
    given = [({"seed": 0}, here), ({"seed": 1}, there), ({"seed": 2}, here)]
    appended = [records.append(path, record, facts) for record, facts in given]
    assert appended == [{**facts, **record} for record, facts in given] == records.read(path)
    assert jsonl.read(path) == [
        {"setting": 1, "facts": here},
        {"setting": 1, "seed": 0},
        {"setting": 2, "facts": there},
        {"setting": 2, "seed": 1},
        {"setting": 1, "seed": 2},
    ]


def test_a_record_may_state_all_itself(path):
    records.append(path, {"seed": 0}, {"data": "text"})
    jsonl.append(path, {"seed": 1, "data": "by hand"}, {"setting": 1, "seed": 2, "data": "own"})
    assert [r["data"] for r in records.read(path)] == ["text", "by hand", "own"]


def test_two_files_one_after_the_other_are_one(tmp_path, path):
    """As git leaves them when both branches have appended: numbers come twice."""
    expected = []
    for name in ("ours", "theirs"):
        branch = tmp_path / name
        expected += [records.append(branch, {"seed": s}, {"commit": name}) for s in (0, 1)]
        with path.open("ab") as merged:
            merged.write(branch.read_bytes())
    assert records.read(path) == expected
    more = [records.append(path, {"seed": 2}, {"commit": name}) for name in ("ours", "theirs")]
    assert records.read(path) == expected + more


def test_a_number_that_is_left_out_is_not_given_to_another_setting(path):
    jsonl.append(path, {"setting": 3, "facts": {"commit": "a"}}, {"setting": 3, "seed": 0})
    records.append(path, {"seed": 1}, {"commit": "b"})
    records.append(path, {"seed": 2}, {"commit": "c"})
    assert [r["commit"] for r in records.read(path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"setting": 7, "seed": 1}, "no line before it states its setting 7"),
        ({"step": 1}, "no record of a benchmark, for it states no data"),
        ({"facts": {"data": "text"}}, "no record of a benchmark, for it states no data"),
    ],
)
def test_a_line_that_is_no_record_is_named(path, capsys, line, sentence):
    records.append(path, {"seed": 0}, {"data": "text"})
    jsonl.append(path, line)
    with pytest.raises(SystemExit) as stopped:
        records.read(path)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{path}, line 3: {sentence}\n"


@pytest.mark.parametrize("cut", [2, 8, 30, 60])
def test_a_killed_writer_spoils_no_other_record(path, cut):
    """Whether what it left is a torn record or a torn setting."""
    first = records.append(path, {"seed": 0}, {"data": "text"})
    records.append(path, {"seed": 1}, {"data": "other"})
    path.write_bytes(path.read_bytes()[:-cut])
    last = records.append(path, {"seed": 2}, {"data": "third"})
    assert records.read(path) == [first, last]


def _write(path, name):
    for seed in range(20):
        records.append(path, {"seed": seed}, {"commit": name, "long": "x" * 5000})


def test_two_processes_never_give_two_settings_one_number(path):
    names = ["a", "b", "c"]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name)) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = {(r["commit"], r["seed"]) for r in records.read(path)}
    assert found == {(name, seed) for name in names for seed in range(20)}
    assert len([line for line in jsonl.read(path) if "facts" in line]) == len(names)


# --- the files in git --------------------------------------------------------------------------


@pytest.fixture
def in_git(monkeypatch):
    """A book on a file in git, in its own setting and of its newest law, that runs nothing.

    Of one method that is the law that it was last run with: after a new one the guard comes first,
    its ablations later.
    """

    def opened(name, *facts, method=None):
        found = records.read(RESULTS / name)
        laws = [r["law"] for r in found if r["law"] and method in (None, r.get("method"))]
        monkeypatch.setattr(records, "LAW", laws[-1] if laws else None)
        return book_of(name, {fact: found[-1][fact] for fact in facts})

    return opened


def book_of(name, facts):
    return Book(RESULTS / name, facts, lambda cell: pytest.fail(f"{cell} was run"), {})


SHAPE = ("tokens", "model", "length", "batch_size")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("stress.jsonl", []),
        ("stress_long.jsonl", ["--long", "--methods", "adamw", "guard", "--lrs", "1"]),
    ],
)
def test_the_stress_grid_in_git_is_found(name, arguments, in_git):
    """All that the documented commands plan, of every method that has been run at all."""
    options = stress._options(arguments)
    steps = SIZES[options.size].steps
    tuned = {r["regime"]: r["tuned"] for r in records.read(RESULTS / name) if r["tuned"]}
    planned, run = 0, {r["method"] for r in records.read(RESULTS / name)}
    for method in [m for m in options.methods if m in run]:
        options.methods = [method]
        facts = (*SHAPE, "size", "base_steps", "rank", "evaluated")
        book = in_git(name, *facts, method=method)
        cells = [c for r in REGIMES for c in stress.plan(r, tuned[r], steps[r], options)]
        assert [cell for cell in cells if book.find(cell) is None] == []
        planned += len(cells)
    assert planned >= 24


def test_the_faults_in_git_are_found(in_git):
    book, options = in_git("faults.jsonl", *SHAPE), faults._options([])
    rate = faults.tune(book)
    options.methods = [m for m in options.methods if m != "guard"]
    cells = [c for part in faults.PARTS for c in faults.plan(part, rate, options)]
    options.methods = ["guard"]  # its episodes of the mix are in no table
    cells += [c for part in ("grid", "calm") for c in faults.plan(part, rate, options)]
    assert len(cells) == 8 * (30 * 20 + 1) + 2 * 200
    assert [cell for cell in cells if book.find(cell) is None] == []


@pytest.mark.parametrize("benchmark", [atlas, faults, stress])
def test_a_quick_run_writes_no_file_in_git(benchmark, capsys):
    options = benchmark._options(["--quick"])
    assert options.out == records.quick(benchmark.RESULTS)
    ignored = ["git", "check-ignore", "--quiet", str(options.out)]
    assert subprocess.run(ignored, cwd=RESULTS).returncode == 0
    assert benchmark._options([]).out == benchmark.RESULTS
    with pytest.raises(SystemExit):
        benchmark._options(["--help"])
    said = "".join(capsys.readouterr().out.split())
    assert f"--quickruns/quick/{benchmark.RESULTS.name}" in said


class Steps:
    """What a plan asks of a bench."""

    size = SIZES["default"]


def test_the_sensitivity_grid_in_git_is_found(in_git):
    book = in_git(sensitivity.RESULTS.name, *SHAPE, "size")
    cells = sensitivity.plan(Steps)
    assert [cell for cell in cells if book.find(cell) is None] == []


def test_the_other_models_in_git_are_found(in_git, monkeypatch):
    """The command itself, on the file in git: it has nothing to run."""
    in_git("generality.jsonl")
    tokens = records.read(generality.RESULTS)[-1]["tokens"]
    monkeypatch.setattr(generality, "fingerprint", lambda _: tokens)
    models = dict.fromkeys(task for task, _ in generality.PAIRS)
    monkeypatch.setattr(generality.data, "load", lambda *_, **__: None)
    monkeypatch.setattr(generality, "tasks", lambda _: models)
    monkeypatch.setattr(generality, "measure", lambda _, cell: pytest.fail(f"{cell} was run"))
    monkeypatch.setattr("sys.argv", ["generality"])
    generality.main()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_no_file_in_git_says_a_thing_twice(path):
    """A fact that is equal in all records of a file stands with the setting, and so on."""
    lines = jsonl.read(path)
    settings = [json.dumps(line["facts"]) for line in lines if "facts" in line]
    assert len(set(settings)) == len(settings)
    assert not any("key" in line for line in lines)


def test_results_are_small():
    """What git holds of results; curves and superseded records belong to the history."""
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 2_000_000

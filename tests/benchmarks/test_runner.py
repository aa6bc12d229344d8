"""Cells are found again by their plain facts, whoever wrote the record; the rest is run, once."""

import json

import pytest

from benchmarks import runner
from benchmarks.records import law, one_law
from benchmarks.runner import Book
from train import jsonl

FACTS = {"data": "text", "tokens": "t", "model": {"layers": 2}}


def cell_of(method="guard", seed=0, rate=0.1, kinds=("a", "b")):
    cell = {"method": method, "seed": seed, "rate": rate, "kinds": list(kinds)}
    return {**cell, "steps": 10, "law": law(method == "guard")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def opened(path, facts=FACTS):
    """A book that must not run anything."""
    return Book(path, facts, lambda cell: pytest.fail(f"{cell} was run"), {})


def written_by_hand(path, **changed):
    path.write_text(json.dumps({**cell_of(), **FACTS, "loss": 4.0, **changed}) + "\n")


def test_a_cell_is_run_once_and_its_record_states_all(path):
    runs = []
    book = Book(path, FACTS, lambda cell: runs.append(cell) or {"loss": 3.0}, {"data": "text"})
    first = book.record(cell_of())
    assert book.record(cell_of()) == first == book.find(cell_of())
    assert book.find(cell_of(seed=1)) is None
    assert opened(path).record(cell_of()) == first
    assert runs == [cell_of()]
    stated = {**cell_of(), **FACTS, "loss": 3.0, "data": "text"}
    assert stated.items() <= first.items()
    assert {"commit", "versions", "machine"} < first.keys()


def test_a_record_written_by_hand_or_at_another_commit_is_recognised(path):
    """In any order of its fields, with others beside them, and with 1 for 1.0."""
    line = dict(reversed({**cell_of(rate=1), **FACTS, "loss": 4.0, "commit": "f00d"}.items()))
    path.write_text(json.dumps(line) + "\n")
    assert opened(path).record(cell_of(rate=1.0))["loss"] == 4.0


def test_facts_that_many_cells_share_stand_with_the_setting(path):
    shared = ("method", "law", "no such fact")
    book = Book(path, FACTS, lambda cell: {"loss": 3.0}, {}, shared)
    first = book.record(cell_of())
    assert [set(line) & set(shared) for line in jsonl.read(path)] == [set(), set()]
    assert opened(path).record(cell_of()) == first
    assert opened(path).find(cell_of(method="adamw")) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"rate": 0.2},
        {"kinds": ["a"]},
        {"steps": 20},
        {"law": "an older law"},
        {"tokens": "other"},
        {"model": {"layers": 3}},
    ],
)
def test_a_record_that_differs_in_one_fact_is_another_cell(path, changed):
    written_by_hand(path, **changed)
    assert opened(path).find(cell_of()) is None


def test_the_newest_record_of_a_cell_counts(path):
    written_by_hand(path)
    jsonl.append(path, {**cell_of(), **FACTS, "loss": 5.0})
    assert opened(path).record(cell_of())["loss"] == 5.0


def test_what_is_there_is_skipped_and_the_rest_is_reported(path, capsys):
    written_by_hand(path)
    book = Book(path, FACTS, lambda cell: {"loss": 3.0}, {})
    cells = [cell_of(seed=seed) for seed in range(3)]
    runner.run(book, cells, lambda record: f"seed {record['seed']}: {record['loss']}")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "1 cells are there, 2 to run"
    assert [line.partition(": ")[2] for line in said[1:]] == ["seed 1: 3.0", "seed 2: 3.0"]
    assert said[1].startswith(" 50%, ")
    assert said[2].startswith("100%, 0 min left")
    runner.run(opened(path), cells, str)
    assert capsys.readouterr().err == "3 cells are there, 0 to run\n"


@pytest.mark.parametrize(
    ("laws", "shown"),
    [
        (["older", None, "newer"], [None, "newer"]),
        (["older", "older", None, "newer"], ["older", "older", None]),
        (["older", "older", "newer", "newer", "newer"], ["newer"] * 3),
        ([None, None], [None, None]),
        ([], []),
    ],
)
def test_a_table_shows_one_law(laws, shown):
    """That of the most runs, of equally many the newest; what has no law is always shown."""
    assert [record["law"] for record in one_law({"law": law} for law in laws)] == shown


def test_a_table_counts_the_guards_own_runs():
    """One run of a new law does not empty a table, nor do many of its ablations."""
    old = [{"law": "older", "method": "guard"}] * 2
    new = [{"law": "newer", "method": "guard"}] + [{"law": "newer", "method": "ablation"}] * 5
    assert one_law(old + new) == old

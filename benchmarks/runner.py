"""Runs the cells of a benchmark that its result file lacks, one after the other.

A benchmark says what its cells are and how one is run; a run of it may be killed and started again,
or split over processes that append to one file.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import records
from benchmarks.records import Cell, Record
from train.provenance import provenance


class Book:
    """The records of one result file that share a setting, and the means to add those that lack.

    Args:
      path: of the result file.
      facts: of the setting (data, model, ...), which a record must share to be found.
      measure: runs a cell, and returns its numbers.
      about: more that is said of the setting, and that decides no number.
      shared: facts of a cell that so many cells share that they stand with the setting.
    """

    def __init__(
        self,
        path: Path,
        facts: Record,
        measure: Callable[[Cell], Record],
        about: Record,
        shared: Sequence[str] = (),
    ) -> None:
        self._path, self._measure, self._shared = path, measure, shared
        self._setting = {**facts, **about, **provenance()}
        self._records = [r for r in records.read(path) if _shares(r, facts)]
        self._found: dict[tuple[str, ...], dict[tuple[Any, ...], Record]] = {}

    def find(self, cell: Cell) -> Record | None:
        """The newest record of this cell, or None."""
        names = tuple(cell)
        if names not in self._found:
            self._found[names] = {_values(record, names): record for record in self._records}
        return self._found[names].get(_values(cell, names))

    def record(self, cell: Cell) -> Record:
        """The record of this cell, which is run where there is none."""
        found = self.find(cell)
        if found is None:
            record = {**cell, **self._measure(cell)}
            shared = {name: record.pop(name) for name in self._shared if name in cell}
            found = records.append(self._path, record, {**shared, **self._setting})
            self._records.append(found)
            for names, known in self._found.items():
                known[_values(found, names)] = found
        return found


def run(book: Book, cells: Sequence[Cell], say: Callable[[Record], str]) -> None:
    """Run the cells that the book lacks. Each has its `steps`; `say` makes a line of a record."""
    pending = [cell for cell in cells if book.find(cell) is None]
    print(f"{len(cells) - len(pending)} cells are there, {len(pending)} to run", file=sys.stderr)
    report = _progress(sum(cell["steps"] for cell in pending))
    for cell in pending:
        report(cell["steps"], say(book.record(cell)))


def _progress(total: int) -> Callable[[int, str], None]:
    """A function that reports a finished cell: a bar in a terminal, a line elsewhere."""
    bar = tqdm(total=total, unit="step", disable=not sys.stderr.isatty())
    began, done = time.perf_counter(), 0

    def report(steps: int, line: str) -> None:
        nonlocal done
        done += steps
        left = (time.perf_counter() - began) * (total / done - 1)
        if bar.disable:
            print(f"{done / total:4.0%}, {left / 60:.0f} min left: {line}", file=sys.stderr)
        else:
            bar.write(line, file=sys.stderr)
            bar.update(steps)

    return report


def _shares(record: Record, facts: Record) -> bool:
    return all(record.get(name) == value for name, value in facts.items())


def _values(facts: Record, names: Iterable[str]) -> tuple[Any, ...]:
    """Lists as tuples, which can be looked up."""
    return tuple(_plain(facts.get(name)) for name in names)


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value

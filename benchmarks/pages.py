"""Write the pages, or their measured parts, from the result files: ``python -m benchmarks.pages``.

A part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; what is there is replaced. `PAGES`
says which page has which parts. With ``--check`` nothing is written, and the exit code is 1 if a
page is not what the files say. The figures are drawn by the commands of their benchmarks, and
PAPER.md is written by `python -m benchmarks.paper.page`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.classifier import tables as classifier
from benchmarks.faults import tables as faults
from benchmarks.health import tables as health
from benchmarks.parts import freezing, front, research, speed
from benchmarks.records import FOLDER, read
from benchmarks.stress import tables as stress

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = "benchmarks"

PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": front.demo},
    "docs/benchmarks.md": {
        "overhead": speed.overhead,
        "cost": speed.cost,
        "throughput": speed.throughput_short,
        "stress": front.stress,
        "faults": front.faults,
        "health": lambda: health.summary(read(FOLDER / "health.jsonl")),
    },
    "docs/freezing.md": {"faults": freezing.faults, "sound": freezing.sound},
    "docs/placements.md": {"placements": front.placements},
    "docs/prediction.md": {
        "targets": classifier.targets,
        "leaderboard": classifier.leaderboard,
        "families": classifier.families,
        "calibration": classifier.calibration,
        "adapted": classifier.adapted,
    },
    "docs/rollback.md": {"rollback cost": speed.rollback_cost},
    f"{BENCHMARKS}/THROUGHPUT.md": {"throughput": speed.throughput},
    "docs/research.md": {
        "more seeds": research.more_seeds,
        "attempts": partial(research.attempts, "hidden 64,"),
        "attempts at the benchmark's size": partial(research.attempts, "hidden 96,"),
        "attempts over ten seeds": partial(research.attempts, "seeds 10 to 19,"),
        "attempts on a base that knows the text": partial(research.attempts, "known text,"),
        "generality": research.generality,
        "sensitivity": research.sensitivity,
    },
}
"""The parts of each page by their names."""

WHOLE: dict[str, Callable[[], str]] = {
    f"{BENCHMARKS}/STRESS.md": lambda: stress.page(FOLDER / "stress.jsonl", "test", "STRESS.png"),
    f"{BENCHMARKS}/FAULTS.md": lambda: faults.page(read(FOLDER / "faults.jsonl"), "FAULTS.png"),
    f"{BENCHMARKS}/HEALTH.md": lambda: health.page(read(FOLDER / "health.jsonl")),
}
"""Pages that are made as a whole."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the pages up to date; returns the exit code."""
    parser = argparse.ArgumentParser(description="The pages of the benchmarks.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    options = parser.parse_args(arguments)
    stale = [name for name in (*PAGES, *WHOLE) if not _is_current(name, write=not options.check)]
    if options.check and stale:
        print(f"{', '.join(stale)}: not what the result files say; run python -m benchmarks.pages")
    return int(options.check and bool(stale))


def _is_current(name: str, *, write: bool) -> bool:
    """Whether the page was what its result files say."""
    path = ROOT / name
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if name in WHOLE:
        new = WHOLE[name]()
    else:
        new = fill(old, {part: make() for part, make in PAGES[name].items()})
    if write:
        path.write_text(new, encoding="utf-8")
    return old == new


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with each named part replaced; a name that the page lacks raises `ValueError`."""
    for name, text in parts.items():
        found = re.search(rf"(<!-- {name} -->\n)(.*?)<!-- /{name} -->", page, re.DOTALL)
        if found is None:
            raise ValueError(f"the page has no part <!-- {name} --> ... <!-- /{name} -->")
        start, end = found.span(2)
        page = page[:start] + text + "\n" + page[end:]
    return page


if __name__ == "__main__":
    sys.exit(main())

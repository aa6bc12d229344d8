"""``lbw-report``: one HTML file from what runs have left."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lbw_optax.report import page, picture, reading


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lbw-report",
        description="One HTML file, which needs no network, on what happened in one run or more.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        type=Path,
        help="a run directory, a directory with an AuditLog, or a log of another program: JSON "
        "Lines, CSV, a trainer_state.json or a TensorBoard event file",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="the file to write; else report.html in the run directory, or in this one for several",
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="draw the same charts into this PNG as well (needs matplotlib)",
    )
    chosen = parser.parse_args(arguments)
    told, unread = _tell(chosen.runs)
    for sentence in unread:
        print(f"lbw-report: {sentence}", file=sys.stderr)
    if not told:
        return 2
    try:
        _write(told, out := chosen.out or _place(chosen.runs))
        if chosen.png is not None:
            picture.picture(told, chosen.png)
    except (OSError, ImportError) as error:
        print(f"lbw-report: {_sentence(error)}", file=sys.stderr)
        return 2
    for one in told:
        for complaint in one.run.complaints:
            print(f"lbw-report: {one.run.name}: {complaint}", file=sys.stderr)
        print(f"{one.run.name}: {one.story}")
    print(*(place for place in (out, chosen.png) if place is not None), sep="\n")
    return 0


def report(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> Path:
    """Draw runs on one page, as ``lbw-report`` does, and return where it is.

    Args:
      runs: run directories, or logs.
      out: the file to write; else ``report.html`` in the run directory, or in the working
        directory for several runs.

    Raises:
      OSError: if a run is not there, or the file cannot be written; FileExistsError if there is a
        file that is no report of ours.
      ValueError: if a run has no log that can be read.

    Example:
      >>> import tempfile, pathlib
      >>> place = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (place / "log.csv").write_text("step,loss\\n1,3.0\\n2,2.5\\n")
      >>> report([place]).name
      'report.html'
    """
    paths = [Path(run) for run in runs]
    place = Path(out) if out is not None else _place(paths)
    _write([page.tell(reading.read(path)) for path in paths], place)
    return place


def _tell(paths: Sequence[Path]) -> tuple[list[page.Told], list[str]]:
    """Those runs that can be read, and a sentence for each other one."""
    told, unread = [], []
    for path in paths:
        try:
            told.append(page.tell(reading.read(path)))
        except (OSError, ValueError, ImportError) as error:
            unread.append(_sentence(error))
    return told, unread


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _place(paths: Sequence[Path]) -> Path:
    """Of a log of its own, the report is named after it."""
    if len(paths) > 1:
        return Path("report.html")
    (path,) = paths
    return path / "report.html" if path.is_dir() else path.with_name(f"{path.name}.report.html")


def _write(told: Sequence[page.Told], out: Path) -> None:
    """Whole or not at all, and never over a file that is none of ours."""
    if out.exists():
        with out.open("rb") as file:
            if file.read(len(page.BEGINNING)) != page.BEGINNING.encode():
                raise FileExistsError(
                    17, "is there and no report of ours; pass another file with --out", str(out)
                )
    new = out.with_name(f"{out.name}.new")
    new.write_text(page.page(told), encoding="utf-8")
    new.replace(out)

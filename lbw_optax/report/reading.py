"""What is on the disk of a run: its metrics, its interventions, and what of them is damaged."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lbw_optax import orders
from lbw_optax.report import columns as parse
from lbw_optax.report.columns import Columns
from lbw_optax.state import Mode


class Run(NamedTuple):
    """One run, as far as it has left anything.

    Attributes:
      name: of its directory or file.
      columns: its metrics in the order written; empty where only interventions were logged.
      audit: the lines of its `AuditLog`, in their order, each a dict as written.
      finished: whether a ``result.json`` says that the run came to its end; None: it never does.
      guarded: whether a guard was at work, or watched.
      complaints: sentences on what is damaged.
    """

    name: str
    columns: Columns
    audit: list[dict[str, Any]]
    finished: bool | None
    guarded: bool
    complaints: list[str]


def read(path: Path) -> Run:
    """A run directory, an audit log, or a log of another program.

    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: if there is nothing that can be read as a log.
      ImportError: for a TensorBoard log without its reader.
    """
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or directory", str(path))
    return _read_directory(path) if path.is_dir() else _read_file(path)


def watches(run: Run) -> bool:
    """Whether the guard, at the end, observed and did not act."""
    return bool((run.columns.get("mode", np.zeros(0))[-1:] == Mode.OBSERVE).any())


def _read_directory(path: Path) -> Run:
    logs, audits = written(path)
    complaints: list[str] = []
    others = [] if logs else _other_logs(path)
    if not (logs or audits or others):
        raise ValueError(
            f"{path} holds no log: neither a .jsonl file with lines, nor a .csv, a "
            "trainer_state.json or a TensorBoard event file. Has the run made a step?"
        )
    columns: Columns = {}
    if logs or others:
        file = (logs or others)[0]
        columns, complaints = _reader(file)(file)
        complaints += [f"{x.name} is not read: {file.name} is." for x in (logs or others)[1:]]
    audit: list[dict[str, Any]] = []
    for file in audits[:1]:
        audit, more = parse.json_lines(file)
        complaints += more
    complaints += [f"{x.name} is not read: {audits[0].name} is." for x in audits[1:]]
    guarded = bool(audit) or any(_last_part(name) == "scale" for name in columns)
    is_ours = (path / "config.json").exists() and (path / "log.jsonl").exists()
    finished = (path / "result.json").exists() if is_ours else None
    return Run(_name(path), columns, _sound(audit), finished, guarded, complaints)


def written(path: Path) -> tuple[list[Path], list[Path]]:
    """The JSON Lines files of a directory with metrics, and the audit logs; usual names first."""
    logs: list[Path] = []
    audits: list[Path] = []
    for file in sorted(path.glob("*.jsonl"), key=_usual_first):
        kind = _kind(file)
        if kind is not None and file.name != orders.FILE:
            (audits if kind == "audit" else logs).append(file)
    return logs, audits


def _read_file(path: Path) -> Run:
    if path.suffix == ".jsonl" and _kind(path) == "audit":
        audit, complaints = parse.json_lines(path)
        return Run(_name(path), {}, _sound(audit), None, True, complaints)
    columns, complaints = _reader(path)(path)
    if not columns:
        raise ValueError(f"{path} holds no line that can be read as a log.")
    guarded = any(_last_part(name) == "scale" for name in columns)
    return Run(_name(path), columns, [], None, guarded, complaints)


def _reader(path: Path) -> Callable[[Path], tuple[Columns, list[str]]]:
    """By the name of the file; one of an unknown name is looked into."""
    if "tfevents" in path.name:
        return parse.of_tensorboard
    if path.suffix == ".wandb":
        raise ValueError(
            f"{path.name} is W&B's own format, which has no public reader: export the run's "
            "history as CSV (run.history().to_csv) and pass that."
        )
    if path.suffix == ".json":
        return parse.of_trainer_state
    if path.suffix in (".csv", ".tsv"):
        return parse.of_csv
    with path.open("rb") as file:
        begins = file.read(64).lstrip()
    return parse.of_json_lines if path.suffix == ".jsonl" or begins[:1] == b"{" else parse.of_csv


def _usual_first(path: Path) -> tuple[int, str]:
    usual = ("log.jsonl", "metrics.jsonl", "events.jsonl", "audit.jsonl")
    return usual.index(path.name) if path.name in usual else len(usual), path.name


def _kind(path: Path) -> str | None:
    """What the first whole line is of: "audit" or "log"; None if there is none."""
    with path.open("rb") as file:
        for line in file:
            try:
                read = json.loads(line.decode())
            except (ValueError, RecursionError):
                continue
            if isinstance(read, dict):
                return "audit" if isinstance(read.get("action"), str) else "log"
    return None


def _other_logs(path: Path) -> list[Path]:
    """Of another program: the newest state of a Trainer, a table, or TensorBoard's."""

    def saved_at(file: Path) -> int:
        number = re.search(r"(\d+)$", file.parent.name)
        return int(number[1]) if number else 0

    trainer = [*path.glob("trainer_state.json"), *path.glob("checkpoint-*/trainer_state.json")]
    if trainer:
        # In the run's own directory is the state at the end.
        return [max(trainer, key=lambda x: (x.parent == path, saved_at(x)))]
    return sorted(path.glob("*.csv")) or sorted(
        [*path.glob("*tfevents*"), *path.glob("tensorboard/*tfevents*")]
    )


def _sound(audit: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those lines that say what was done and when, or what was lost."""

    def is_sound(line: dict[str, Any]) -> bool:
        whole = all(type(line.get(x, 0)) is int for x in ("step", "last_step", *_ENDS))
        return isinstance(line.get("action"), str) and whole

    return [line for line in audit if is_sound(line) and ("step" in line or _is_lost(line))]


_ENDS = ("from_step", "to_step")


def _is_lost(line: dict[str, Any]) -> bool:
    return line["action"] == "lost" and type(line.get("interventions")) is int


def _name(path: Path) -> str:
    return path.resolve().name or str(path)


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def steps(columns: Columns) -> np.ndarray:
    """The step of each line; without any, the number of the line, from 0."""
    length = len(next(iter(columns.values()), ()))
    found = columns.get("step")
    if found is None or not np.isfinite(found).any():
        return np.arange(length, dtype=np.float64)
    missing = ~np.isfinite(found)
    if missing.any():  # as the line before it
        last = np.maximum.accumulate(np.where(missing, -1, np.arange(length)))
        found = np.where(last >= 0, found[np.maximum(last, 0)], found[~missing][0])
    return found


def kept(step: np.ndarray) -> np.ndarray:
    """Which lines still count: those whose step no later line has reached again.

    After a rollback, or a resume from a checkpoint, the steps from there on are made anew.

    >>> kept(np.array([1., 2., 3., 4., 3., 4., 5.])).tolist()
    [True, True, False, False, True, True, True]
    """
    later = np.minimum.accumulate(np.append(step, np.inf)[::-1])[::-1][1:]
    return step < later


class Freeze(NamedTuple):
    """One time that a layer was frozen.

    Attributes:
      group: its name.
      start: the first frozen step, counted as interventions are.
      end: the step in which it trains again; None where no line says so.
      signal: why.
    """

    group: str
    start: int
    end: int | None
    signal: str


def freezes(run: Run) -> list[Freeze]:
    """Every time that a layer was frozen, in the order of the audit log."""
    found: list[Freeze] = []
    begun: dict[str, int] = {}  # from a layer that is frozen to its place in the list
    for line in run.audit:
        if line["action"] not in ("freeze", "thaw") or "step" not in line:
            continue
        group = " · ".join(str(line[x]) for x in ("guard", "group") if line.get(x))
        if line["action"] == "freeze":
            begun[group] = len(found)
            found.append(Freeze(group, line["step"], None, str(line.get("signal", ""))))
        elif group in begun:
            at = begun.pop(group)
            found[at] = found[at]._replace(end=line["step"])
    return found

"""What a run has written, read on from where the last look ended."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from lbw_optax.lines import Lines
from lbw_optax.report.reading import written

# Interventions that are kept to be shown.
NEWEST = 50
# Steps that the speed is the mean of.
TIMED = 50
# Names that a log may have for the step's duration are many; its time of day has these.
TIMES = ("time", "_timestamp")


class Seen(NamedTuple):
    """A run, as far as it has come.

    Attributes:
      steps: of the lines that count: what a rollback has undone is not among them.
      columns: each number of those lines by name, nan where a line has none; as long as `steps`.
      regimes: of each line, "" where it says none.
      last: the newest line.
      audit: the newest interventions and orders.
      total: steps that the run will have; None where no ``config.json`` says so.
      finished: whether it has ended.
    """

    steps: list[int]
    columns: dict[str, list[float]]
    regimes: list[str]
    last: dict[str, Any]
    audit: list[dict[str, Any]]
    total: int | None
    finished: bool

    def seconds_a_step(self) -> float | None:
        """Over the newest steps; None while it cannot be told."""
        for name in TIMES:
            times = self.columns.get(name, [])[-TIMED:]
            if len(times) > 1 and math.isfinite(times[-1] - times[0]):
                steps = self.steps[-1] - self.steps[-len(times)]
                return (times[-1] - times[0]) / steps if steps > 0 else None
        return None

    def seconds_left(self) -> float | None:
        """Until the last step, at this speed."""
        each = self.seconds_a_step()
        if each is None or self.total is None or self.finished:
            return None
        return max(self.total - self.steps[-1], 0) * each


class Following:
    """Reads a run's directory again and again, and each byte of it once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._log: Lines | None = None
        self._audit: Lines | None = None
        self._seen = Seen([], {}, [], {}, [], None, False)

    def look(self) -> Seen:
        """The run as it is now.

        Raises:
          OSError: if the directory cannot be read.
        """
        if self._log is None or self._audit is None:
            logs, audits = written(self._directory)
            self._log = self._log or (Lines(logs[0]) if logs else None)
            self._audit = self._audit or (Lines(audits[0]) if audits else None)
        for line in _dicts(self._log):
            self._take(line)
        interventions = _dicts(self._audit)
        self._seen = self._seen._replace(
            audit=(self._seen.audit + interventions)[-NEWEST:],
            total=_steps(self._directory / "config.json"),
            finished=finished(self._directory),
        )
        return self._seen

    def _take(self, line: dict[str, Any]) -> None:
        """Lines from the step of a new one on were undone: by a rollback, or a kill."""
        steps, columns = self._seen.steps, self._seen.columns
        step = line.get("step", len(steps))
        if type(step) is not int or abs(step) > _MOST_STEPS:
            return
        while steps and steps[-1] >= step:
            del steps[-1], self._seen.regimes[-1]
            for values in columns.values():
                del values[-1]
        for name, x in line.items():
            if isinstance(x, float | int) and not isinstance(x, bool):
                columns.setdefault(name, [math.nan] * len(steps))
        for name, values in columns.items():
            x = line.get(name)
            values.append(_number(x) if isinstance(x, float | int) else math.nan)
        steps.append(step)
        regime = line.get("regime")
        self._seen.regimes.append(regime if isinstance(regime, str) else "")
        self._seen = self._seen._replace(last=line)


# Beyond, float64 tells steps no more from each other.
_MOST_STEPS = 2**53


def _number(x: float) -> float:
    """An integer may have more digits than a float holds."""
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def finished(directory: Path) -> bool:
    """Whether the run has its result, and has not been told since to go on to another step."""
    result, config = directory / "result.json", _steps(directory / "config.json")
    return result.exists() and _steps(result) in (None, config)


def _steps(file: Path) -> int | None:
    """That these options, or a result of them, say."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        steps = read.get("options", read).get("steps")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return steps if type(steps) is int else None


def _dicts(lines: Lines | None) -> list[dict[str, Any]]:
    """What has come in; lines that are no dicts are passed over."""
    return [line for row in lines.new() if (line := _dict(row)) is not None] if lines else []


def _dict(row: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None

"""Metrics as JSON Lines: what `lbw-watch` and `lbw-report` read of a run."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lbw_optax.appending import Appender, opened
from lbw_optax.audit import as_json, whole_step
from lbw_optax.exporters.names import parts, plain
from lbw_optax.law.control import REGIMES
from lbw_optax.lines import is_torn


class MetricsLog:
    """Appends a line of metrics at each call, with the regime by its name and the time of day.

    The buckets of a histogram become one list, ``gradient_log2``, in the order of k. After a resume
    or a rollback some steps come again; readers take the newest line of each. What is not finite is
    null, as JSON has it. Where the disk is full, training goes on with one warning, and lines wait
    in memory for room.

    Args:
      path: the file, ``log.jsonl`` in the run's directory. With several processes, on the first.

    Raises:
      OSError: if it cannot be opened.
      ValueError: if it is a pipe or a device.
      TypeError: if a step is no integer, or a metric no number.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> with MetricsLog(path) as log:
      ...     log(1, {"loss": 2.5, "regime": 0, "time": 1.7e9})
      >>> print(path.read_text().strip())
      {"step": 1, "loss": 2.5, "regime": "nominal", "time": 1700000000.0}
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._file = opened(Path(path))
        self._lines = Appender(self._file, "log")
        if is_torn(self._file):
            self._lines.add("\n")

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the scalars of one step; `step` counts the updates made, from 1."""
        values: dict[str, Any] = {"step": whole_step(step), **_with_lists(plain(metrics))}
        values.setdefault("time", round(time.time(), 3))
        if "regime" in values:
            values["regime"] = dict(enumerate(REGIMES)).get(values["regime"])
        self._lines.add(json.dumps(as_json(values), allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            self._lines.close()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _with_lists(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Sixteen names in each line would be longer than their numbers.

    >>> _with_lists({"loss": 2.5, "b/gradient_log2/-2": 7, "b/gradient_log2/-4": 0})
    {'loss': 2.5, 'b/gradient_log2': [0, 7]}
    """
    found = {name: parts(name).bucket for name in metrics}
    edges = {name: int(k) for name, k in found.items() if k.removeprefix("-").isdecimal()}
    listed: dict[str, Any] = {name: x for name, x in metrics.items() if name not in edges}
    for name in sorted(edges, key=edges.__getitem__):
        listed.setdefault(name.rpartition("/")[0], []).append(metrics[name])
    return listed

"""Metrics as a text file for Prometheus, which its node exporter's textfile collector reads."""

import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbw_optax.exporters.names import NAMES, Name, parts, plain

_LOG = logging.getLogger("lbw_optax")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OWN_LABELS = ("guard", "k")
_STEP = Name("run", "Updates made; a rollback lowers it")


class PrometheusFile:
    """Writes the newest metrics into a text file, which is replaced as a whole.

    Each metric has its name after ``lbw_``, and ``_total`` where it counts up; the step is
    ``lbw_step``. The path of a guard, where a state holds several, is the label ``guard``; a bucket
    of the histogram is the label ``k``. A file that cannot be written is a warning, once, and the
    run goes on.

    Args:
      path: the file, ``NAME.prom`` in the collector's directory, which must exist. With several
        processes, on the first.
      labels: of every metric, as ``{"run": "mine"}``. Runs on one machine must differ in them.

    Raises:
      ValueError: if the collector would not read the file, or a label is none.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "mine.prom"
      >>> PrometheusFile(path, {"run": "mine"})(7, {"skips": 2})
      >>> print(path.read_text(), end="")
      # HELP lbw_step Updates made; a rollback lowers it
      # TYPE lbw_step gauge
      lbw_step{run="mine"} 7.0
      # HELP lbw_skips_total Skipped steps
      # TYPE lbw_skips_total counter
      lbw_skips_total{run="mine"} 2.0
    """

    def __init__(self, path: str | os.PathLike[str], labels: Mapping[str, str] = {}):
        self._path, self._labels = Path(path), dict(labels)
        if self._path.suffix != ".prom" or not self._path.parent.is_dir():
            raise ValueError(
                f"The textfile collector reads *.prom in a directory that exists, got {path}."
            )
        for name in self._labels:
            if not _LABEL.fullmatch(name) or name in _OWN_LABELS:
                raise ValueError(
                    f"{name!r} can be no label here: take letters, digits and _, and neither of "
                    f"{_OWN_LABELS}."
                )
        self._has_failed = False

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Replace the file; `step` counts the updates made. Waits for the device."""
        text = _text(int(step), plain(metrics), self._labels)
        # Another name than *.prom, which the collector would read half-written.
        half = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            half.write_text(text, encoding="utf-8")
            half.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
            if not self._has_failed:
                self._has_failed = True
                _LOG.warning(
                    "The metrics for Prometheus cannot be written to %s (%s): free space there, or "
                    "let this user write to it. Training goes on, and each call tries again.",
                    self._path,
                    error.strerror,
                )


def _text(step: int, metrics: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """In the text format: all samples of a metric after the lines that describe it."""
    families: dict[str, dict[str, float]] = defaultdict(dict)
    described: dict[str, Name] = {}
    for name, x in {"step": step, **metrics}.items():
        guard, base, bucket = parts(name)
        known = _STEP if name == "step" else NAMES.get(base, Name("run", ""))
        full = f"lbw_{base or re.sub(r'[^a-zA-Z0-9_]', '_', name)}" + "_total" * known.is_counter
        families[full][_in_braces({**labels, "guard": guard, "k": bucket})] = x
        described[full] = known
    lines = []
    for full, samples in families.items():
        known = described[full]
        lines += [f"# HELP {full} {known.help}\n"] * bool(known.help)
        lines += [f"# TYPE {full} {'counter' if known.is_counter else 'gauge'}\n"]
        lines += [f"{full}{braces} {_number(x)}\n" for braces, x in samples.items()]
    return "".join(lines)


def _in_braces(labels: Mapping[str, str]) -> str:
    escaped = {ord("\\"): r"\\", ord('"'): r"\"", ord("\n"): r"\n"}
    given = ",".join(f'{k}="{str(x).translate(escaped)}"' for k, x in labels.items() if x)
    return f"{{{given}}}" if given else ""


def _number(x: float) -> str:
    """As Prometheus and Go write it.

    >>> _number(0.5), _number(True), _number(float("nan")), _number(-float("inf"))
    ('0.5', '1.0', 'NaN', '-Inf')
    """
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(repr(float(x)), repr(float(x)))

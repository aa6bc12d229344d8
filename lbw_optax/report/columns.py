"""A log as columns: a log's lines, however they are written, become arrays under known names."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lbw_optax.law.control import REGIMES
from lbw_optax.law.telemetry import HISTOGRAM_EDGES

Columns = dict[str, np.ndarray]
"""Float64 arrays of one length, in the order in which the lines were written.

NaN: nothing was logged. Infinity: something was, and it is no finite number. "regime" alone is an
array of names, "" where there is none.
"""

# What other programs call it, the most usual first.
_NAMES = {
    "step": ("global_step", "_step", "train/global_step", "iteration", "iter", "update"),
    "loss": (
        *("train_loss", "train/loss", "loss/train", "training_loss", "train/train_loss"),
        *("lm loss", "lm_loss", "total_loss", "train/total_loss", "losses/total_loss"),
    ),
    "gradient_norm": (
        *("grad_norm", "train/grad_norm", "global_grad_norm", "grad/norm", "gnorm", "grad-norm"),
        *("grad_norm/total", "train/gradient_norm", "signals/gradient_norm", "optim/grad_norm"),
    ),
    "learning_rate": ("lr", "train/learning_rate", "train/lr", "run/learning_rate", "optim/lr"),
    "time": ("_timestamp", "timestamp", "wall_time"),
    "scale": ("guard/scale",),
    "regime": ("guard/regime",),
}
_STEPS = ("step", *_NAMES["step"])
HISTOGRAM, PEAKS = "gradient_log2", "activation_peaks"
# So many complaints about one file are told; the others are counted.
_TOLD = 5


def json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects in a file of JSON Lines, and a sentence for what is damaged and passed over."""
    found, damaged = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                read = json.loads(line.decode())
                if not isinstance(read, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError):
                damaged.append((number, line))
            else:
                found.append(read)
    return found, _complaints(path, damaged)


def _complaints(path: Path, damaged: list[tuple[int, bytes]]) -> list[str]:
    told = [
        f"{path.name}, line {number}, is damaged and passed over: it begins "
        f"{line[:40].decode(errors='replace')!r}."
        for number, line in damaged[:_TOLD]
    ]
    more = len(damaged) - len(told)
    return told + [f"{path.name}: {more} more lines are damaged and passed over."] * (more > 0)


def of_json_lines(path: Path) -> tuple[Columns, list[str]]:
    """Each line an object, as most loggers write."""
    lines, complaints = json_lines(path)
    return of_rows(lines), complaints


def of_csv(path: Path) -> tuple[Columns, list[str]]:
    """The first line has the names; a line of another length is passed over, and named."""
    rows, damaged = [], []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        sample = file.read(4096)
        file.seek(0)
        separator = max(",;\t", key=sample.partition("\n")[0].count)
        lines = csv.reader((line.replace("\0", "") for line in file), delimiter=separator)
        try:
            names = next(lines, [])
            for cells in lines:
                if len(cells) == len(names):
                    rows.append({k: x for k, x in zip(names, cells, strict=True) if x.strip()})
                elif cells:
                    damaged.append((lines.line_num, separator.join(cells).encode()))
        except csv.Error as error:
            raise ValueError(f"{path} is no table of comma-separated values: {error}.") from error
    return of_rows(rows), _complaints(path, damaged)


def of_trainer_state(path: Path) -> tuple[Columns, list[str]]:
    """``log_history`` of a Hugging Face Trainer; its lines on evaluations have no loss."""
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return of_rows([line for line in history if isinstance(line, dict)]), []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no trainer_state.json of a Hugging Face Trainer: it holds no list "
            "log_history. For another log in JSON, write one object a line and name it .jsonl."
        ) from error


def of_tensorboard(path: Path) -> tuple[Columns, list[str]]:
    """The scalars of one event file.

    Raises:
      ImportError: where neither tensorboard nor tensorboardX is installed.
    """
    event_type = _tensorboard_events()
    rows: dict[int, dict[str, Any]] = {}
    complaints = []
    records = _records(path.read_bytes())
    for record in records:
        if record is None:
            complaints.append(f"{path.name}: its end is torn, and passed over.")
            continue
        event = event_type.FromString(record)
        for value in event.summary.value:
            number = value.simple_value
            if value.HasField("tensor"):
                if len(value.tensor.float_val) != 1:
                    continue
                number = value.tensor.float_val[0]
            rows.setdefault(event.step, {"step": event.step, "time": event.wall_time})
            rows[event.step][value.tag] = number
    return of_rows(rows.values()), complaints


def _tensorboard_events() -> Any:
    for module in ("tensorboard.compat.proto.event_pb2", "tensorboardX.proto.event_pb2"):
        try:
            return __import__(module, fromlist=["Event"]).Event
        except ImportError:
            continue
    raise ImportError(
        "A TensorBoard log needs its reader: pip install tensorboard, or export the scalars as CSV."
    )


def _records(content: bytes) -> Iterator[bytes | None]:
    """The records of a TFRecord file; None for a torn end. The sums are those of a transport."""
    at = 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        record = content[at + 12 : at + 12 + size]
        at += 16 + size
        if at > len(content):
            yield None
            return
        yield record


def of_mapping(log: Mapping[str, Any]) -> Columns:
    """Arrays that are in memory already: each is one metric, all of the same length."""
    columns = {str(name): np.asarray(x) for name, x in log.items()}
    lengths = {name: x.shape for name, x in columns.items()}
    if len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"the arrays must be one-dimensional, of one length; they are {lengths}.")
    return _named({name: _numbers(x.tolist()) for name, x in columns.items()})


def of_rows(rows: Iterable[Mapping[str, Any]]) -> Columns:
    """Objects, one a step, as columns under the names that we know."""
    nested = {dict, list}
    flat = _merged(
        row if nested.isdisjoint(map(type, row.values())) else _flat(row) for row in rows
    )
    names: dict[str, None] = {}
    for row in flat:
        if not row.keys() <= names.keys():
            names |= dict.fromkeys(row)
    columns = {}
    for name in names:
        found = [row.get(name, _ABSENT) for row in flat]
        if name.rpartition("/")[2] == "regime":
            columns[name] = np.array([_regime(x) for x in found])
        else:
            numbers = _numbers(found)
            if not np.isnan(numbers).all():
                columns[name] = numbers
    return _named(columns)


_ABSENT = object()


def _merged(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Loggers that write a line a metric: neighbours of one step that have no metric in common."""
    merged: list[Mapping[str, Any]] = []
    for row in rows:
        if merged and _same_step(merged[-1], row):
            merged[-1] = {**row, **merged[-1]}
        else:
            merged.append(row)
    return merged


def _same_step(row: Mapping[str, Any], following: Mapping[str, Any]) -> bool:
    step = next((x for x in _STEPS if x in row), None)
    if step is None or row[step] != following.get(step, _ABSENT):
        return False
    return not (row.keys() & following.keys()) - {step, "epoch", *_NAMES["time"], "time"}


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, x in row.items():
        last = name.rpartition("/")[2]
        if last in (HISTOGRAM, PEAKS) and isinstance(x, list):
            of = HISTOGRAM_EDGES if last == HISTOGRAM else range(len(x))
            x = dict(zip(map(str, of), x, strict=False))
        flat |= _flat(x, f"{prefix}{name}/") if isinstance(x, dict) else {f"{prefix}{name}": x}
    return flat


def _numbers(values: list[Any]) -> np.ndarray:
    if _ABSENT not in values and None not in values:
        try:
            numbers = np.array(values, np.float64)
        except (ValueError, TypeError, OverflowError):
            pass
        else:
            if numbers.ndim == 1:  # a list a line makes a table, and is no number
                return np.where(np.isfinite(numbers), numbers, np.inf)
    return np.array([_number(x) for x in values], np.float64)


def _number(x: Any) -> float:
    """NaN for what is no number at all, infinity for one that is not finite.

    >>> [_number(x) for x in (2, "0.5", None, "NaN", "red", True)]
    [2.0, 0.5, inf, inf, nan, 1.0]
    """
    if x is None:  # JSON has no NaN
        return math.inf
    if isinstance(x, int | float | str):
        try:
            number = float(x)
        except (ValueError, OverflowError):
            return math.nan
        return number if math.isfinite(number) else math.inf
    return math.nan


def _regime(x: Any) -> str:
    if isinstance(x, str):
        return x if x in REGIMES else ""
    number = _number(x)
    whole = math.isfinite(number) and 0 <= number < len(REGIMES)
    return REGIMES[int(number)] if whole else ""


def _named(columns: Columns) -> Columns:
    """With the names that we know for what others call otherwise."""
    lower = {name.lower().strip(): name for name in reversed(columns)}
    renamed = {}
    for known, others in _NAMES.items():
        theirs = next((lower[x] for x in (known, *others) if x in lower), None)
        if theirs is not None:
            renamed[theirs] = known
    return {renamed.get(name, name): x for name, x in columns.items()}

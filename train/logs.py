"""A run's metrics: one JSON line a step, and the same to TensorBoard, W&B or trackio."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from train.jsonl import finite, read


class Logs:
    """Appends to ``log.jsonl`` in a run directory, and to every tracker that is named.

    After a resume or a rollback some steps come again; `history` takes the newest line of each.

    Args:
      directory: the run directory.
      track: of "tensorboard", "wandb", "trackio".
      config: the run's options, for the trackers that show them.

    Raises:
      ImportError: for a tracker that is not installed.

    Example:
      >>> import tempfile
      >>> place = Path(tempfile.mkdtemp())
      >>> with Logs(place, track=()) as logs:
      ...     logs.write(1, {"loss": 2.5})
      >>> history(place)["loss"]
      array([2.5])
    """

    def __init__(self, directory: Path, track: Collection[str], config: Mapping[str, Any] = {}):
        self._trackers = [_TRACKERS[name](directory, config) for name in track]
        self._file = (directory / "log.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the scalars of one step; `step` counts the updates made, from 1."""
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        self._file.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        for tracker in self._trackers:
            tracker(step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker(None, {})


def history(directory: Path) -> dict[str, np.ndarray]:
    """Each metric over the steps that were logged, in their order; NaN where it was not."""
    lines = {line["step"]: line for line in read(directory / "log.jsonl")}
    ordered = [lines[step] for step in sorted(lines)]
    names = dict.fromkeys(name for line in ordered for name in line)

    def value(line: dict[str, Any], name: str) -> float:
        return float("nan") if line.get(name) is None else line[name]

    return {name: np.array([value(line, name) for line in ordered]) for name in names}


Tracker = Callable[[int | None, dict[str, float]], None]
"""Takes the metrics of a step; called with None at the end."""


def _tensorboard(directory: Path, config: Mapping[str, Any]) -> Tracker:
    try:
        from tensorboardX import FileWriter
        from tensorboardX.proto.summary_pb2 import Summary
    except ImportError as error:
        raise ImportError(
            "--track tensorboard needs tensorboardX: pip install 'lbw_optax[train]', or give "
            "--track without a name"
        ) from error
    writer = FileWriter(str(directory / "tensorboard"))

    def track(step: int | None, metrics: dict[str, float]) -> None:
        if step is None:
            writer.close()
        else:
            # One event a step; `SummaryWriter.add_scalar` makes one a number, four times as slowly.
            values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
            writer.add_summary(Summary(value=values), step)

    return track


def _service(name: str) -> Callable[[Path, Mapping[str, Any]], Tracker]:
    """W&B, or trackio, which has the same three calls."""

    def open_run(directory: Path, config: Mapping[str, Any]) -> Tracker:
        try:
            service = __import__(name)
        except ImportError as error:
            raise ImportError(f"--track {name} needs {name}: pip install {name}") from error
        service.init(project="lbw_optax", name=directory.name, config=dict(config))

        def track(step: int | None, metrics: dict[str, float]) -> None:
            if step is None:
                service.finish()
            else:
                service.log(metrics, step=step)

        return track

    return open_run


_TRACKERS = {
    "tensorboard": _tensorboard,
    "wandb": _service("wandb"),
    "trackio": _service("trackio"),
}

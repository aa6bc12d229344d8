"""A run's metrics: one JSON line a step, and the same to TensorBoard, W&B or trackio."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from lbw_optax.exporters import MetricsLog, grouped
from lbw_optax.exporters.names import LISTS, parts
from train.jsonl import read


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
        self._trackers = [_TRACKERS[name](directory, config) for name in dict.fromkeys(track)]
        self._file = MetricsLog(directory / "log.jsonl")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the scalars of one step; `step` counts the updates made, from 1.

        Trackers get numbers only, under the names of `lbw_optax.exporters.tag`, and no histogram,
        which would be sixteen charts.
        """
        self._file(step, metrics)
        left_out = [name for name in metrics if name in ("time", *LISTS) or parts(name).bucket]
        tagged = grouped({name: x for name, x in metrics.items() if name not in left_out})
        for tracker in self._trackers:
            tracker(step, tagged)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker(None, {})


def require(track: Collection[str]) -> None:
    """See that the trackers of these names are installed.

    Raises:
      ImportError: for one that is not, with the command that installs it.
    """
    for name in track:
        _MODULES[name]()


def history(directory: Path) -> dict[str, np.ndarray]:
    """Each metric over the steps that were logged, in their order; NaN where it was not.

    A metric of names, the regime, is an array of strings, empty where it was not logged. A
    histogram, which is a list in each line, is not among them.
    """
    lines = {line["step"]: line for line in read(directory / "log.jsonl")}
    ordered = [lines[step] for step in sorted(lines)]
    names = dict.fromkeys(k for line in ordered for k, x in line.items() if type(x) is not list)

    def column(name: str) -> np.ndarray:
        found = [line.get(name) for line in ordered]
        missing = "" if any(isinstance(x, str) for x in found) else float("nan")
        return np.array([missing if x is None else x for x in found])

    return {name: column(name) for name in names}


Tracker = Callable[[int | None, dict[str, float]], None]
"""Takes the metrics of a step; called with None at the end."""


def _tensorboard(directory: Path, config: Mapping[str, Any]) -> Tracker:
    event_files, summaries = _tensorboard_modules()
    writer = event_files.FileWriter(str(directory / "tensorboard"))

    def track(step: int | None, metrics: dict[str, float]) -> None:
        if step is None:
            writer.close()
        else:
            # One event a step; `SummaryWriter.add_scalar` makes one a number, four times as slowly.
            values = [summaries.Summary.Value(tag=t, simple_value=x) for t, x in metrics.items()]
            writer.add_summary(summaries.Summary(value=values), step)

    return track


def _tensorboard_modules() -> tuple[Any, Any]:
    try:
        import tensorboardX
        from tensorboardX.proto import summary_pb2
    except ImportError as error:
        raise ImportError(
            "--track tensorboard needs tensorboardX: pip install --group train, or give "
            "--track without a name"
        ) from error
    return tensorboardX, summary_pb2


def _service(name: str) -> Callable[[Path, Mapping[str, Any]], Tracker]:
    """W&B, or trackio, which has the same three calls."""

    def open_run(directory: Path, config: Mapping[str, Any]) -> Tracker:
        service = _service_module(name)
        try:
            service.init(project="lbw_optax", name=directory.name, config=dict(config))
        except Exception as error:  # whatever the service raises, for a missing key say
            raise OSError(
                f"--track {name} cannot begin a run ({error}): log in there, or leave it out."
            ) from error

        def track(step: int | None, metrics: dict[str, float]) -> None:
            if step is None:
                service.finish()
            else:
                service.log(metrics, step=step)

        return track

    return open_run


def _service_module(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"--track {name} needs {name}: pip install {name}") from error


_TRACKERS = {
    "tensorboard": _tensorboard,
    "wandb": _service("wandb"),
    "trackio": _service("trackio"),
}
_MODULES: dict[str, Callable[[], Any]] = {
    "tensorboard": _tensorboard_modules,
    "wandb": lambda: _service_module("wandb"),
    "trackio": lambda: _service_module("trackio"),
}

"""What a run with rollbacks must remember beside its checkpoints, in one small JSON file.

The file is replaced as a whole, so a kill leaves the old one or the new one; the one before is kept
in case that the newest is damaged. A checkpoint that it does not name does not exist, whatever lies
on disk.
"""

import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GOOD, CANDIDATE = "good", "candidate"


@dataclass
class Journal:
    """Checkpoints, data position and rollbacks of one run.

    Attributes:
      checkpoints: step to "good" (proven healthy) or "candidate".
      jumps: pairs (step, offset): from that step on, step s takes batch s + offset.
      rollbacks: all so far, oldest first.
    """

    checkpoints: dict[int, str] = field(default_factory=dict)
    jumps: list[tuple[int, int]] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def data_step(self, step: int) -> int:
        """The batch for the update that follows `step`."""
        return step + next((offset for start, offset in reversed(self.jumps) if start <= step), 0)

    def jump(self, from_step: int, to_step: int) -> None:
        """Back at `to_step`, go on with the batch that would have followed `from_step`."""
        offset = self.data_step(from_step) - to_step
        self.jumps = [jump for jump in self.jumps if jump[0] < to_step] + [(to_step, offset)]


def read(path: Path) -> Journal:
    """The journal, empty if there is none; the one before it, with a warning, if it is damaged.

    Raises:
      ValueError: if both are damaged.
    """
    before = _before(path)
    if not path.exists() and not before.exists():
        return Journal()
    try:
        return _parse(path)
    except ValueError as error:
        try:
            journal = _parse(before)
        except ValueError:
            raise ValueError(
                f"{path} is damaged ({error}), and so is the copy before it: restore one of them, "
                "or pass another directory to start anew."
            ) from error
        if path.exists():  # or else a kill came between the two renames of `write`
            warnings.warn(
                f"{path} is damaged ({error}): the one before it is used.",
                RuntimeWarning,
                stacklevel=2,
            )
        return journal


def _parse(path: Path) -> Journal:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checkpoints = {int(step): state for step, state in content["checkpoints"].items()}
        jumps = [(int(start), int(offset)) for start, offset in content["jumps"]]
        return Journal(checkpoints, jumps, list(content["rollbacks"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def write(path: Path, journal: Journal) -> None:
    """Replace the file, durably, and keep the one before."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(asdict(journal), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(_before(path))
    new.replace(path)


def _before(path: Path) -> Path:
    return path.with_suffix(".before.json")

"""What a run with rollbacks must remember beside its checkpoints, in one small JSON file.

The file is replaced as a whole, so a kill leaves the old one or the new one. A checkpoint that it
does not name does not exist, whatever lies on disk.
"""

import json
import os
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
    """The journal, empty if there is none.

    Raises:
      ValueError: if the file is not one.
    """
    if not path.exists():
        return Journal()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checkpoints = {int(step): state for step, state in content["checkpoints"].items()}
        jumps = [(int(start), int(offset)) for start, offset in content["jumps"]]
        return Journal(checkpoints, jumps, list(content["rollbacks"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error


def write(path: Path, journal: Journal) -> None:
    """Replace the file, durably."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(asdict(journal), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)

"""What a run with rollbacks must remember beside its checkpoints, in one small JSON file.

The file is replaced as a whole, so a kill leaves the old one or the new one; the one before is kept
in case that the newest is damaged.
"""

import itertools
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

GOOD, CANDIDATE = "good", "candidate"


class Rollback(NamedTuple):
    """One return to an earlier state.

    Attributes:
      from_step: the step that was left.
      to_step: the step that it went back to.
      reason: one of `lbw_optax.law.divergence.REASONS`, or what `request` was given.
      tier: "memory" or "disk", which is also what a checkpointer of yours had.
      skipped_batches: batches that are not used again.
      at_call: calls of `step` before it.
    """

    from_step: int
    to_step: int
    reason: str
    tier: str
    skipped_batches: int
    at_call: int


@dataclass
class Journal:
    """Checkpoints, data position and rollbacks of one run.

    Attributes:
      checkpoints: step to "good" (proven healthy) or "candidate" (not proven, or refused).
      jumps: pairs (step, offset): from that step on, step s takes batch s + offset.
      rollbacks: all so far, oldest first.
      calls: of `step` so far.
      dropped: steps whose folders are to be deleted, in case that a kill comes before.
      unknown: what a newer version wrote, kept as it is; of rollbacks one dict each.
    """

    checkpoints: dict[int, str] = field(default_factory=dict)
    jumps: list[tuple[int, int]] = field(default_factory=list)
    rollbacks: list[Rollback] = field(default_factory=list)
    calls: int = 0
    dropped: list[int] = field(default_factory=list)
    unknown: dict[str, Any] = field(default_factory=dict)

    def data_step(self, step: int) -> int:
        """The batch for the update that follows `step`."""
        return step + next((offset for start, offset in reversed(self.jumps) if start <= step), 0)

    def jump(self, from_step: int, to_step: int) -> None:
        """Back at `to_step`, go on with the batch that would have followed `from_step`."""
        offset = self.data_step(from_step) - to_step
        self.jumps = [jump for jump in self.jumps if jump[0] < to_step] + [(to_step, offset)]

    def drop(self, steps: list[int]) -> None:
        """These checkpoints are to be deleted."""
        for step in steps:
            self.checkpoints.pop(step, None)
        self.dropped = sorted({*self.dropped, *steps})


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
    """What a newer version has added is kept; what this one needs must be there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {name: content.pop(name) for name in ("checkpoints", "jumps", "rollbacks")}
        rollbacks = [_rollback(entry) for entry in known["rollbacks"]]
        calls = max((r.at_call for r in rollbacks), default=0)  # as before it was written
        return Journal(
            {_step(step): _standing(x) for step, x in known["checkpoints"].items()},
            [(_whole(start), _whole(offset)) for start, offset in known["jumps"]],
            rollbacks,
            calls=max(calls, _whole(content.pop("calls", 0))),
            dropped=[_whole(step) for step in content.pop("dropped", [])],
            unknown={**content, "rollbacks": [_unknown(entry) for entry in known["rollbacks"]]},
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is missing") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _rollback(entry: dict[str, Any]) -> Rollback:
    read = Rollback(**{name: entry[name] for name in Rollback._fields})
    texts = {name: str(getattr(read, name)) for name in ("reason", "tier")}
    numbers = {name: _whole(getattr(read, name)) for name in read._fields if name not in texts}
    return Rollback(**numbers, **texts)  # type: ignore[arg-type]


def _unknown(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in entry.items() if name not in Rollback._fields}


def _standing(x: Any) -> str:
    if x not in (GOOD, CANDIDATE):
        raise ValueError(f"{x!r} is no standing of a checkpoint")
    return x


def _step(name: str) -> int:
    if not (name.isdecimal() and str(int(name)) == name):
        raise ValueError(f"{name!r} is no step")
    return int(name)


def _whole(x: Any) -> int:
    if type(x) is not int or x < 0:
        raise ValueError(f"{x!r} is no whole number")
    return x


def write(path: Path, journal: Journal) -> None:
    """Replace the file, durably, and keep the one before."""
    content = {name: x for name, x in vars(journal).items() if name != "unknown"}
    others = itertools.chain(journal.unknown.get("rollbacks", []), itertools.repeat({}))
    content["rollbacks"] = [
        {**other, **rollback._asdict()}
        for rollback, other in zip(journal.rollbacks, others, strict=False)
    ]
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        json.dump({**journal.unknown, **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(_before(path))
    new.replace(path)


def _before(path: Path) -> Path:
    return path.with_suffix(".before.json")

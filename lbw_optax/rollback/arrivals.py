"""The guard's own state after each rollback, on disk: what a run that is killed then would lose.

A rollback changes nothing but the guard: a ceiling on the scale, what it knows of the loss, and its
events. These are small, and written before the journal says that the rollback was. A run that
resumes from an earlier checkpoint takes them over when it comes to that step again.
"""

import re
import shutil
import warnings
from pathlib import Path

import jax

from lbw_optax.rollback import checkpoints, snapshots
from lbw_optax.rollback.agreement import first_text
from lbw_optax.rollback.checkpoints import OtherModel, Unreadable
from lbw_optax.state import GuardState, find_all, map_guards
from lbw_optax.types import PyTree

_NAME = re.compile(r"\d+-\d+")


class Arrivals:
    """One folder for each step that was gone back to: its name is the step and the batch."""

    def __init__(self, path: Path):
        self._path = path

    def save(self, step: int, batch: int, tree: PyTree, wanted: list[tuple[int, int]]) -> None:
        """Write the guards of a state, and wait; all but those of `wanted` are deleted.

        Raises:
          OSError: on all processes, if one cannot.
        """
        error = ""
        try:
            snapshot = snapshots.take(step, _guards(tree), for_disk=True)
            checkpoints.save(self._folder(step, batch), snapshot)()
            self._clear([*wanted, (step, batch)])
        except Exception as problem:  # whatever Orbax raises when a disk is full
            error = str(problem) or type(problem).__name__
        error = first_text(error)
        if error:
            raise OSError(error)

    def take_over(self, step: int, batch: int, tree: PyTree) -> PyTree:
        """The state with its guards as they were after the rollback to this step."""
        error, guards = "", _guards(tree)
        try:
            guards = checkpoints.load(self._folder(step, batch), step, guards)
        except (OtherModel, Unreadable) as problem:
            error = str(problem)
        error = first_text(error)
        if error:
            warnings.warn(
                f"What the guard knew after the rollback to step {step} cannot be read ({error}): "
                "the run goes on without it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return tree
        rest = iter(guards)
        return map_guards(lambda guard: next(rest)._replace(inner_state=guard.inner_state), tree)

    def _folder(self, step: int, batch: int) -> Path:
        return self._path / f"{step}-{batch}"

    def _clear(self, wanted: list[tuple[int, int]]) -> None:
        names = {self._folder(*arrival).name for arrival in wanted}
        for path in self._path.glob("*"):
            if jax.process_index() == 0 and _NAME.fullmatch(path.name) and path.name not in names:
                shutil.rmtree(path, ignore_errors=True)


def _guards(tree: PyTree) -> list[GuardState]:
    return [guard._replace(inner_state=None) for guard in find_all(tree)]

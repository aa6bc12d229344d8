"""A team's own Orbax manager, of either API, as the few calls that a rollback makes of it.

It is read, waited for, and asked to delete what a rollback has left. It is never told to save, and
its directory is not touched but by itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lbw_optax.rollback import snapshots
from lbw_optax.rollback.agreement import first_text
from lbw_optax.rollback.checkpoints import Unreadable, ocp
from lbw_optax.rollback.folder import Folder
from lbw_optax.types import PyTree

Restore = Callable[[int, PyTree], PyTree]

# What is called of each: of a `CheckpointManager`, and of a `Checkpointer` of the v1 API.
_V0 = ("all_steps", "restore", "delete", "wait_until_finished", "directory")
_V1 = ("checkpoints", "load", "delete", "wait", "directory")


class Checkpointer:
    """One that is somebody else's.

    Args:
      manager: an `orbax.checkpoint.CheckpointManager`, or a v1 `ocp.training.Checkpointer`.
      restore: from a step and an abstract state to a state; None is for a manager of one item, with
        `StandardRestore`, or `load` of v1.

    Raises:
      ValueError: if it is neither, or its directory is none that a journal can lie beside.
    """

    def __init__(self, manager: Any, restore: Restore | None = None):
        # Of the class: a property of the object may read a directory.
        self._is_v1 = all(hasattr(type(manager), name) for name in _V1)
        if not self._is_v1 and not all(hasattr(type(manager), name) for name in _V0):
            raise ValueError(
                "checkpointer must be an orbax.checkpoint.CheckpointManager, or a "
                f"Checkpointer of orbax.checkpoint.v1.training, got {manager!r}."
            )
        if restore is not None and not callable(restore):
            raise ValueError(
                "restore must be a function from a step and an abstract state to a state, got "
                f"{restore!r}."
            )
        self._manager, self._restore = manager, restore
        self.directory = str(manager.directory)
        if "://" in self.directory:
            raise ValueError(
                f"The checkpointer's directory is {self.directory}, and the journal of rollbacks "
                "lies beside it, in a folder that can be locked: keep checkpoints on a file "
                "system, or give RollbackManager a directory there and use LastProven for yours."
            )

    @property
    def name(self) -> str:
        return type(self._manager).__name__

    @property
    def journal(self) -> Path:
        """The folder for what a rollback must remember: beside theirs, never in it."""
        path = Path(self.directory)
        return path.with_name(f"{path.name}.rollback")

    def folder(self) -> Folder:
        """That folder, made and locked.

        Raises:
          OSError: if it cannot be.
        """
        return Folder(
            self.journal,
            unwritable=(
                "The journal of rollbacks",
                f"it lies beside your checkpoints in {self.directory}, where this user must be "
                "able to make a folder",
            ),
        )

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are there, or being written, as the manager itself knows them."""
        if self._is_v1:
            return sorted(int(x.step) for x in self._manager.checkpoints)
        return sorted(map(int, self._manager.all_steps()))

    def wait(self) -> str:
        """Until nothing is being written; what went wrong, or ""."""
        problem = ""
        try:
            self._manager.wait() if self._is_v1 else self._manager.wait_until_finished()
        except Exception as error:  # of the team's own save, which is told so by the next one, too
            problem = _say(error)
        return first_text(problem)

    def load(self, step: int, like: PyTree) -> PyTree:
        """What lies there as the state of a step, by the manager's own way, placed as `like` is.

        Raises:
          Unreadable: if the manager cannot, on any process.
        """
        tree, problem = None, ""
        abstract = jax.tree.map(_abstract, like)
        structure: Any = jax.tree.structure(abstract)
        try:
            tree = (self._restore or self._load)(step, abstract)
            if jax.tree.structure(tree) != structure:
                raise ValueError("what was restored is of another structure than the state")
            tree = snapshots.place(snapshots.flatten(tree), like)
        except Exception as error:
            problem = _say(error)
        problem = first_text(problem)
        if problem:
            raise Unreadable(problem)
        return tree

    def delete(self, step: int) -> str:
        """By the manager's own way; why it could not, or ""."""
        problem = ""
        try:
            self._manager.delete(step)
        except Exception as error:
            problem = _say(error)
        return first_text(problem)

    def _load(self, step: int, abstract: PyTree) -> PyTree:
        if self._is_v1:
            return self._manager.load(step, abstract)
        from orbax.checkpoint import (
            args,
        )  # of the older API, which is imported for those who use it

        return self._manager.restore(step, args=args.StandardRestore(abstract))


def _abstract(x: Any) -> Any:
    return ocp.arrays.to_shape_dtype_struct(x) if isinstance(x, jax.Array) else x


def _say(error: BaseException) -> str:
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__

"""Orbax's checkpoints of named leaves, one folder a step; no other module reads or writes them.

A checkpoint holds the leaves, the scalars among them as one array for each dtype, their checksums
and its step, so that what is read is what was written, and of the step that its name says.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax.rollback import packing, snapshots
from lbw_optax.rollback.snapshots import Snapshot
from lbw_optax.types import PyTree

try:
    import tensorstore
    from orbax.checkpoint import v1 as ocp
except ImportError as error:
    raise ImportError(
        "RollbackManager needs Orbax: install it with pip install 'lbw_optax[rollback]'."
    ) from error


# The entry of a checkpoint's metadata that says which scalars its vectors hold.
_NAMES = "scalars"
# What Orbax calls a checkpoint of a step that it has not finished.
_UNFINISHED = re.compile(r"(\d+)\.orbax-checkpoint-tmp.*")


class Unreadable(Exception):
    """A checkpoint that is damaged or incomplete."""


class OtherModel(ValueError):
    """A checkpoint of a state with other names, shapes or dtypes."""


def require_writable(tree: PyTree) -> None:
    """Every leaf must be of a kind that a checkpoint can hold.

    Raises:
      TypeError: that names the first one that is not.
    """
    for name, leaf in snapshots.flatten(tree).items():
        if not _can_hold(leaf.dtype):
            raise TypeError(
                f"The leaf {snapshots.plain_name(name)} of the training state is of dtype "
                f"{leaf.dtype}, which a checkpoint cannot hold: convert it, or keep it out of the "
                "state."
            )


def save(path: Path, snapshot: Snapshot) -> Callable[[], None]:
    """Begin to write a checkpoint; what is returned waits for it and raises what went wrong.

    The folder appears under its name when it is complete, never before.
    """
    leaves = {name: x for name, x in snapshot.leaves.items() if x.size}  # Orbax writes no empty one
    arrays, names = packing.pack(leaves)
    sums = np.asarray(snapshot.sums)
    # Orbax finds out that this cannot be only after it has made coroutines, which nobody awaits.
    path.parent.mkdir(parents=True, exist_ok=True)
    with _uncompressed():
        content = {"leaves": arrays, "sums": sums, "step": np.array([snapshot.step])}
        written = ocp.save_async(path, content, overwrite=True, custom_metadata={_NAMES: names})
        return written.result


def load(path: Path, step: int, like: PyTree) -> PyTree:
    """The state in the checkpoint of this step, placed as `like` is.

    Raises:
      OtherModel: if it does not fit `like`; says where.
      Unreadable: if it cannot be read, its checksums are wrong, or it is of another step.
    """
    wanted = snapshots.flatten(like)
    try:
        description = ocp.metadata(path)
        stored = description.metadata
        # Before scalars were packed, every leaf had an array of its own.
        names = (description.custom_metadata or {}).get(_NAMES, {})
        found = packing.described(stored["leaves"], names)
    except Exception as error:  # whatever Orbax raises for a file that is damaged
        raise Unreadable(f"{type(error).__name__} in its description") from error
    _require_same(found, wanted)
    try:
        leaves = {name: _abstract(x) for name, x in wanted.items() if x.size}
        state: dict[str, Any] = {"leaves": packing.abstract(leaves, names)}
        if "step" in stored:  # before this was written, the name alone said it
            state["step"] = np.zeros(1, np.int64)
        read = ocp.load(path, {**state, "sums": np.zeros(len(wanted), np.uint32)})
        leaves = wanted | packing.unpack(read["leaves"], names, wanted)
    except Exception as error:
        raise Unreadable(f"{type(error).__name__} while reading") from error
    # As the state is placed: what is bound to no device may be beside what is spread over many.
    tree = snapshots.place(leaves, like)
    if not np.array_equal(snapshots.checksums(snapshots.flatten(tree)), read["sums"]):
        raise Unreadable("its checksums do not match")
    (is_of,) = read.get("step", [step])
    if is_of != step:
        raise Unreadable(f"it is a copy of step {is_of}")
    return tree


def is_one(path: Path) -> bool:
    """Whether a checkpoint as `save` writes it lies here, by its description."""
    try:
        return "sums" in ocp.metadata(path).metadata
    except Exception:  # whatever Orbax raises for something else
        return False


def delete(path: Path) -> None:
    """Remove a checkpoint, whole or half-written; a link or a file in its place is none of ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def unfinished(directory: Path) -> list[tuple[int, Path]]:
    """What killed saves have left, each with its step; two may be of one step."""
    found = ((_UNFINISHED.fullmatch(path.name), path) for path in directory.glob("*"))
    return [(int(name[1]), path) for name, path in found if name]


def clear_unfinished(directory: Path) -> None:
    """Remove what killed saves have left."""
    for _, path in unfinished(directory):
        shutil.rmtree(path, ignore_errors=True)


def _can_hold(dtype: np.dtype) -> bool:
    """Whether it is a number that Orbax, through TensorStore, can write."""
    try:
        tensorstore.dtype(dtype)
    except ValueError:
        return False
    return dtype.kind == "b" or jnp.issubdtype(dtype, np.number)


def _uncompressed() -> ocp.Context:
    """Compression takes a tenth off the size of trained floats, at five times the processor time.

    That time is the training step's where the step runs on the same cores.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def _abstract(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return np.zeros(x.shape, x.dtype)


def _require_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    needed = {name: (x.shape, x.dtype) for name, x in wanted.items() if x.size}
    if found == needed:
        return
    rename = {name.partition(" ")[2]: what for name, what in needed.items()}
    stored = {name.partition(" ")[2]: what for name, what in found.items()}
    names = stored.keys() | rename.keys()
    differ = sorted(name for name in names if stored.get(name) != rename.get(name))
    if differ and all(".freezing." in f".{name}" for name in differ):
        raise OtherModel(
            f"only the groups that lbw_guard may freeze differ, {_groups(stored)} in the "
            f"checkpoint and {_groups(rename)} here: pass the same groups=; to go on with others, "
            "resume with the same and take lbw_optax.adopt(tx.init(params), "
            "lbw_optax.strip(state)) with the new optimizer's init"
        )
    lines = [
        f"{name}: {_say(stored.get(name))} in the checkpoint, {_say(rename.get(name))} here"
        for name in differ
    ]
    more = f"; and {len(lines) - 10} more" if len(lines) > 10 else ""
    raise OtherModel("; ".join(lines[:10]) + more if lines else "its leaves are in another order")


def _groups(leaves: dict[str, Any]) -> str:
    kinds = [x for name, x in leaves.items() if f".{name}".endswith(".freezing.names")]
    return " and ".join(str(shape[0]) for shape, _ in kinds) or "none"


def _say(what: Any) -> str:
    return "absent" if what is None else f"{what[1]}{list(what[0])}"

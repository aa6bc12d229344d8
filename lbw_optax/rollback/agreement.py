"""One answer for all processes of a job, though each may see something else.

What one process finds out alone, a full disk or a taken lock, must be known to all before any of
them waits for the others, or those would wait for ever.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # Orbax takes it from there, too: it is in no public module
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lbw_optax.types import PyTree

# Bytes of a text that is handed round.
LONGEST = 1024
# Seconds that processes wait for one another where one of them may have come alone.
PATIENCE = 20.0
_LOOK_AGAIN = 0.02


def largest(numbers: jax.Array) -> jax.Array:
    """The elementwise maximum over all copies of a replicated array. Does not wait.

    Copies should be equal, but a fault of memory strikes one of them, and a loss that each device
    computes for itself makes them differ: then a decision that each process takes by itself would
    tear the job apart.
    """
    copies = [shard.data for shard in numbers.addressable_shards]
    if jax.process_count() == 1:
        return copies[0] if len(copies) == 1 else _largest_here(copies)
    mesh = _one_device_each()
    mine = _largest_here(copies, mesh.local_devices[0])
    shape = (mesh.size, *numbers.shape)
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    return _largest(jax.make_array_from_single_device_arrays(shape, sharding, [mine[None]]))


def is_one_a_device(x: jax.Array) -> bool:
    """Whether a vector lies with one number on each of several devices, as pmap leaves it."""
    if jax.numpy.ndim(x) != 1 or not isinstance(x, jax.Array) or x.size < 2:
        return False
    return len(x.sharding.device_set) == x.size and x.sharding.shard_shape(x.shape) == (1,)


def is_stack_of_equals(tree: PyTree, count: int) -> bool:
    """Whether a stack of so many copies of a state holds the same in all: all floats, to the bit.

    Random keys, which are to differ, are no floats.
    """
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    floats = [x for x in leaves if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)]
    stacked = [x for x in floats if x.ndim and x.shape[0] == count]
    return bool(stacked) and bool(_are_equal(stacked))


def first_text(text: str) -> str:
    """The text of the first process that has one, on every process; "" if none has. Waits for all.

    Errors are handed round with it: "" says that all went well.
    """
    if jax.process_count() == 1:
        return text
    mine = np.zeros(LONGEST, np.uint8)
    letters = text.encode(errors="replace")[:LONGEST]
    mine[: len(letters)] = np.frombuffer(letters, np.uint8)
    everyones = multihost_utils.process_allgather(mine)
    texts = [bytes(x).rstrip(b"\0").decode(errors="ignore") for x in np.asarray(everyones)]
    return next((said for said in texts if said), "")


def from_all(place: str, text: str) -> list[str] | None:
    """What each process says at this place; None on all if one has not come within `PATIENCE`.

    Nothing of it runs on a device: a process that has not come may be waiting there for the others,
    in a training step that they have not begun.

    Args:
      place: a name that is used once.
      text: what this process says.
    """
    client: Any = distributed.global_state.client
    client.key_value_set(f"{place}/said/{jax.process_index()}", text)
    until = time.monotonic() + PATIENCE
    while True:
        said = client.key_value_dir_get(f"{place}/said/")
        is_late = time.monotonic() > until
        if len(said) == jax.process_count() or is_late:
            break
        time.sleep(_LOOK_AGAIN)
    have_come = "yes" if len(said) == jax.process_count() else "no"
    try:  # the first who knows decides for all
        client.key_value_set(f"{place}/all", have_come, allow_overwrite=False)
    except jax.errors.JaxRuntimeError:
        have_come = client.blocking_key_value_get(f"{place}/all", 10_000)
    return [x for _, x in said] if have_come == "yes" else None


def wait_for_all(name: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"lbw_optax {name}")


def _largest_here(copies: list[jax.Array], device: jax.Device | None = None) -> jax.Array:
    """On one device, whatever mesh the caller's loop has set for its own."""
    place = device or next(iter(copies[0].devices()))
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        return _largest_of([jax.device_put(x, place) for x in copies])


@jax.jit
def _are_equal(stacked: list[jax.Array]) -> jax.Array:
    same = [jax.numpy.all((x == x[:1]) | ((x != x) & (x[:1] != x[:1]))) for x in stacked]
    return jax.numpy.stack(same).all()


@jax.jit
def _largest_of(copies: list[jax.Array]) -> jax.Array:
    return functools.reduce(jax.numpy.maximum, copies)


@functools.cache
def _one_device_each() -> Mesh:
    first = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.array([first[i] for i in sorted(first)]), ("process",))


@jax.jit
def _largest(gathered: jax.Array) -> jax.Array:
    replicated = NamedSharding(_one_device_each(), PartitionSpec())
    return jax.lax.with_sharding_constraint(gathered.max(0), replicated)

"""Where arrays live on many devices: a mesh, logical axes by parameter name, a rule per axis.

Everything is computed by XLA's automatic partitioning from where the arguments lie::

    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        params = shard(params, mesh)  # an optimizer state made from it, too
        loss = loss_fn(params, frozen, shard_batch(batch, mesh))
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp", "expert")
"""Mesh axes over which a batch is spread."""

# What the last axes of a parameter mean. A key is the end of a path, the longest one counts.
AXES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed_tokens", "embedding"): ("vocabulary", "hidden"),
    ("lm_head", "kernel"): ("hidden", "vocabulary"),
}
for _name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
    AXES[_name, "kernel"] = ("hidden", "wide")
    AXES[_name, "bias"] = ("wide",)
for _name in ("o_proj", "down_proj"):
    AXES[_name, "kernel"] = ("wide", "hidden")
AXES["gate", "kernel"] = ("hidden", None)
# Adapters: the inputs of A and the outputs of B are those of the kernel, the rank is whole.
for (_name, _leaf), _axes in list(AXES.items()):
    if _leaf == "kernel":
        AXES[_name, "base", "kernel"] = _axes
        AXES[_name, "lora_A"] = (_axes[0], None)
        AXES[_name, "lora_B"] = (None, _axes[1])
        AXES[_name, "lora_magnitude"] = (_axes[1],)
    elif _leaf == "bias":
        AXES[_name, "base", "bias"] = _axes

# Mixtures of experts.
for _name in ("gate_proj", "up_proj"):
    AXES["experts", _name] = ("expert", "hidden", "wide")
AXES["experts", "down_proj"] = ("expert", "wide", "hidden")

RULES = {"vocabulary": "tensor", "wide": "tensor", "hidden": "fsdp", "expert": "expert"}
"""Mesh axis of a logical axis; an axis without a rule is whole on every device."""


def make_mesh(*, data: int = 1, fsdp: int | None = None, tensor: int = 1, expert: int = 1) -> Mesh:
    """Devices as (data, fsdp, expert, tensor); without `fsdp` it takes all that are left.

    `data` repeats the parameters, `fsdp` spreads them and the batch, `expert` spreads the experts
    of a mixture and the batch, `tensor` spreads heads, MLP and vocabulary. Raises `ValueError`
    where the axes do not multiply to the devices there are.

    >>> make_mesh(data=jax.device_count()).axis_names
    ('data', 'fsdp', 'expert', 'tensor')
    """
    devices = jax.device_count()
    fsdp = devices // (data * tensor * expert) if fsdp is None else fsdp
    if data * fsdp * tensor * expert != devices:
        experts = "" if expert == 1 else f", expert={expert}"
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}{experts} and tensor={tensor} has "
            f"{data * fsdp * tensor * expert} devices, but there are {devices}"
        )
    kinds = (AxisType.Auto,) * 4
    return jax.make_mesh((data, fsdp, expert, tensor), (*ROWS, "tensor"), axis_types=kinds)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each array of `tree` by its path (shapes suffice).

    `tree` is a model's parameters, or anything whose paths end like theirs, as an optimizer's
    state. What `AXES` does not name is whole on every device. Raises `ValueError` that lists all
    arrays that a mesh axis does not divide.
    """
    wrong: list[str] = []

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = _spec(_names(path), len(leaf.shape))
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                wrong.append(f"{'.'.join(_names(path))} {leaf.shape} by {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    found = jax.tree_util.tree_map_with_path(sharding, tree)
    if wrong:
        raise ValueError(f"the mesh does not divide these arrays evenly: {'; '.join(wrong)}")
    return found


def shard(tree: Any, mesh: Mesh) -> Any:
    """`tree` with every array where `shardings` wants it."""
    return jax.device_put(tree, shardings(tree, mesh))


def initialise(make: Callable[[], Any], mesh: Mesh) -> Any:
    """``make()``, a tree of parameters or an optimizer state, made in place on the mesh.

    No device ever holds more than its part.
    """
    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch with its sequences spread over (data, fsdp); scalars go to every device.

    Raises `ValueError` for a number of sequences that the mesh does not divide.
    """
    parts = math.prod(mesh.shape[axis] for axis in ROWS)

    def put(leaf: Any) -> jax.Array:
        shape = jax.numpy.shape(leaf)
        if shape and shape[0] % parts:
            raise ValueError(
                f"a batch of {shape[0]} sequences cannot be spread over {parts} devices "
                f"({' times '.join(f'{axis}={mesh.shape[axis]}' for axis in ROWS)}): "
                f"take a multiple of {parts}"
            )
        return jax.device_put(leaf, NamedSharding(mesh, P(ROWS) if shape else P()))

    return jax.tree.map(put, batch)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Keep `x` spread over these mesh axes where there is such a mesh; else it is `x` itself."""
    if not has_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def has_mesh() -> bool:
    """Whether a mesh of `make_mesh` is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and {*ROWS, "tensor"} <= set(mesh.axis_names)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    keys = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))) for key in path)
    return tuple(str(key) for key in keys)


def _spec(names: tuple[str, ...], rank: int) -> P:
    """Leading axes that a rule does not speak of, as that of stacked layers, stay whole."""
    for length in (3, 2):
        axes = AXES.get(names[-length:])
        if axes is not None and len(axes) <= rank:
            found = [None if axis is None else RULES.get(axis) for axis in axes]
            return P(*[None] * (rank - len(found)), *found)
    return P()

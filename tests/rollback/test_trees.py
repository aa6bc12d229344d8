"""Any state comes back as it was: to the bit, in type, dtype, placement and structure."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from support import assert_same_bits, bits

from lbw_optax import RollbackManager, lbw_guard
from lbw_optax.rollback import checkpoints, snapshots

TX = lbw_guard(optax.adam(0.1))


def params() -> Any:
    return {"layers": [{"w": jnp.arange(12.0).reshape(3, 4)}, {"w": -jnp.ones((4, 2))}]}


class Iterator(NamedTuple):
    position: int
    shuffle: np.ndarray
    fraction: float
    seed: np.uint64


def iterator() -> Iterator:
    return Iterator(2**40 + 7, np.arange(5, dtype=np.int64) + 2**50, 0.1, np.uint64(2**63 + 5))


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 2, rngs=rngs)
        self.adapter = nnx.LoRA(4, 2, 2, rngs=rngs)


def nnx_states() -> Any:
    model = Line(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    return nnx.state(model), optimizer.opt_state


def nnx_modules() -> Any:
    model = Line(nnx.Rngs(0))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def lora_only() -> Any:
    adapters = nnx.state(Line(nnx.Rngs(0)), nnx.LoRAParam)
    return adapters, TX.init(adapters)


def train_state() -> Any:
    return TrainState.create(apply_fn=None, params=params(), tx=TX)


def odd_leaves() -> Any:
    return {
        "bf16": jnp.linspace(0, 1, 7, dtype=jnp.bfloat16),
        "f16": jnp.linspace(0, 1, 7, dtype=jnp.float16),
        "f8": jnp.linspace(0, 1, 7).astype(jnp.float8_e4m3fn),
        "int8": jnp.arange(-3, 4, dtype=jnp.int8),
        "int4": jnp.arange(-3, 4).astype(jnp.int4),
        "bool": jnp.array([True, False]),
        "complex": jnp.array([1 + 2j, -3j]),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.asarray(-0.0),
        "weak": jnp.asarray(3.0) * 1,
        "inf": jnp.array([jnp.inf, -jnp.inf]),
        "none": None,
        "flag": True,
        "whole": 7,
    }


def sharded(kind: AxisType = AxisType.Auto) -> Any:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def place(x: jax.Array) -> jax.Array:
        """Matrices split over both axes; the guard's scalars and rings whole everywhere."""
        spec = PartitionSpec("data", "model") if x.ndim == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    w = {"w": jnp.arange(64.0).reshape(8, 8), "b": jnp.arange(3.0)}
    return jax.tree.map(place, w), jax.tree.map(place, TX.init(w))


def partly_sharded() -> Any:
    """As `init` outside of jit makes it: the guard is bound to no device."""
    w, _ = sharded()
    return w, TX.init(jax.tree.map(np.asarray, w))


TREES = {
    "raw_params": lambda: (params(), TX.init(params())),
    "keys": lambda: (params(), TX.init(params()), jax.random.split(jax.random.key(7), 3)),
    "rbg_key": lambda: (TX.init(params()), jax.random.key(1, impl="rbg")),
    "data_iterator": lambda: (params(), TX.init(params()), iterator()),
    "odd_leaves": lambda: (odd_leaves(), TX.init(params())),
    "nnx_states": nnx_states,
    "nnx_modules": nnx_modules,
    "lora_only": lora_only,
    "train_state": train_state,
    "sharded": sharded,
    "partly_sharded": partly_sharded,
    "explicitly_sharded": lambda: sharded(AxisType.Explicit),
}


def leaf_bits(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return bits(array) if array.dtype.kind != "c" else bits(array.ravel().view(np.float32))


def assert_same(actual: Any, expected: Any, *, weak: bool) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        assert type(x) is type(y)
        np.testing.assert_array_equal(leaf_bits(x), leaf_bits(y))
        if isinstance(x, jax.Array):
            assert (x.dtype, x.shape, x.committed) == (y.dtype, y.shape, y.committed)
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
            assert not weak or getattr(x, "weak_type", 0) == getattr(y, "weak_type", 0)


def changed(tree: Any) -> Any:
    """Another state of the same kind, as if training had gone on."""

    def change(x: Any) -> Any:
        floats = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x + jnp.ones_like(x) if floats else x

    return jax.tree.map(change, tree)


def own_leaves(tree: Any) -> list[Any]:
    """All but what a rollback changes in the guard: its ceiling, what asks, its events."""
    names = ("log_ceiling", "ceiling_steps", "divergence", "events")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [x for path, x in leaves if not any(n in jax.tree_util.keystr(path) for n in names)]


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
@pytest.mark.parametrize("snapshot_every", [10, None], ids=["memory", "disk"])
def test_rollback_brings_any_state_back(tmp_path, make, snapshot_every):
    with RollbackManager(tmp_path, snapshot_every=snapshot_every) as rollback:
        step, tree = rollback.resume(make())
        rollback.request("test")
        step, back = rollback.step(1, changed(make()))
    assert step == 0
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert_same(own_leaves(back), own_leaves(make()), weak=snapshot_every is not None)


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_resume_brings_any_state_back(tmp_path, make):
    with RollbackManager(tmp_path) as rollback:
        rollback.resume(make())
    with RollbackManager(tmp_path) as rollback:
        step, tree = rollback.resume(changed(make()))
    assert step == 0
    assert_same(tree, make(), weak=False)


def test_a_sharded_state_resumes_on_other_devices(tmp_path):
    """The checkpoint takes the placement of what it is loaded into."""
    with RollbackManager(tmp_path) as rollback:
        rollback.resume(sharded())
    single = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), sharded())
    with RollbackManager(tmp_path) as rollback:
        _, tree = rollback.resume(changed(single))
    assert_same(tree, single, weak=False)


NUMBERS = [
    "bool", "int2", "int4", "int8", "int16", "int32", "uint2", "uint4", "uint8", "uint16", "uint32",
    "float8_e3m4", "float8_e4m3", "float8_e8m0fnu", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn", "bfloat16", "float16",
    "float32", "complex64",
]  # fmt: skip
HOST_KINDS = [
    "bool", "int64", "uint64", "float16", "float64", "longdouble", "complex128", "clongdouble",
    ">i4", ">f8", ">c16", "datetime64[s]", "timedelta64[ms]", "U3", "S1", "S3", "V1", "V4",
    "i4,f4",
]  # fmt: skip
LEAVES = {
    **{f"jax_{name}": lambda name=name: jnp.arange(3).astype(name) for name in NUMBERS},
    **{f"numpy_{name}": lambda name=name: np.zeros(3, name) for name in HOST_KINDS},
    "a_string": lambda: "run 7",
    "an_object": lambda: np.array([None, 1]),
}


WRITABLE = {
    *{f"jax_{name}" for name in NUMBERS} - {"jax_uint2", "jax_uint4", "jax_float8_e4m3"},
    *(f"numpy_{name}" for name in ("bool", "int64", "uint64", "float16", "float64", "complex128")),
    *(f"numpy_{name}" for name in (">i4", ">f8", ">c16")),
}


@pytest.mark.parametrize("name", sorted(WRITABLE))
def test_a_number_of_any_kind_comes_back(tmp_path, name):
    tree = TX.init(params()), {"extra": LEAVES[name]()}
    with RollbackManager(tmp_path) as rollback:
        rollback.resume(tree)
    with RollbackManager(tmp_path) as rollback:
        _, back = rollback.resume(tree)
    assert_same(back, tree, weak=False)
    assert np.asarray(back[1]["extra"]).dtype == np.asarray(tree[1]["extra"]).dtype


def arrays_in(path: Path) -> set[str]:
    return set(ocp.metadata(path).metadata["leaves"])


def test_scalars_of_every_kind_are_one_array_each_and_come_back(tmp_path):
    """To the bit: NaNs that signal are among them."""
    scalars = {name: (LEAVES[name]()[1], LEAVES[name]()[2]) for name in sorted(WRITABLE)}
    signalling = {
        "float32": jnp.asarray(np.uint32(0x7F800001).view(np.float32)),
        "bfloat16": jnp.asarray(np.uint16(0x7F81).view(jnp.bfloat16)),
        "float8": jnp.asarray(np.uint8(0x7D).view(jnp.float8_e5m2)),
    }
    tree = scalars, signalling, {"python": (True, 7, -0.0), "key": jax.random.key(3)}, params()
    checkpoints.save(tmp_path / "0", snapshots.take(0, tree, for_disk=True))()
    assert_same(checkpoints.load(tmp_path / "0", 0, changed(tree)), tree, weak=False)
    leaves = snapshots.flatten(tree)
    dtypes = {str(x.dtype) for x in leaves.values() if not x.ndim}
    others = {name for name, x in leaves.items() if x.ndim}
    assert arrays_in(tmp_path / "0") == {f"scalars of {dtype}" for dtype in dtypes} | others


def test_a_guard_is_a_few_arrays(tmp_path):
    """Each costs the processor some milliseconds, which are the training step's."""
    tree = TX.init(params())
    checkpoints.save(tmp_path / "0", snapshots.take(0, tree, for_disk=True))()
    assert len(jax.tree.leaves(tree)) > 100
    assert len(arrays_in(tmp_path / "0")) < 30


@pytest.mark.parametrize("name", sorted(LEAVES.keys() - WRITABLE))
def test_a_leaf_that_no_checkpoint_holds_is_named(tmp_path, name):
    """And not taken for a full disk."""
    tree = TX.init(params()), {"extra": LEAVES[name]()}
    with RollbackManager(tmp_path) as rollback, pytest.raises(TypeError, match="extra"):
        rollback.resume(tree)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_pinned_host_memory(tmp_path, monkeypatch):
    """The way that accelerators take; the CPU backend has such a memory too."""
    monkeypatch.setattr(snapshots, "_may_pin", lambda x: True)
    tree = (params(), jax.random.key(7), iterator(), jnp.float32(2.5), jnp.int32(3))
    snapshot = snapshots.take(0, tree, for_disk=True)
    kinds = {x.sharding.memory_kind for x in snapshot.leaves.values() if isinstance(x, jax.Array)}
    assert kinds == {"pinned_host"}
    assert_same(snapshots.restore(snapshot, changed(tree)), tree, weak=False)
    checkpoints.save(tmp_path / "0", snapshot)()
    assert_same(checkpoints.load(tmp_path / "0", 0, changed(tree)), tree, weak=False)


def test_a_snapshot_outlives_donation_and_use():
    """Also when what it gave back is donated in turn."""
    tree = {"w": jnp.arange(1000.0), "host": np.arange(3)}
    snapshot = snapshots.take(0, tree)
    destroy = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    tree["host"][:] = -1
    for leaf in (destroy(tree["w"]), destroy(snapshots.restore(snapshot, tree)["w"])):
        assert float(leaf[0]) == -1
    back = snapshots.restore(snapshot, {"w": jnp.zeros(1000), "host": np.zeros(3, int)})
    assert_same_bits(back, {"w": jnp.arange(1000.0), "host": np.arange(3)})


# --- checksums ---------------------------------------------------------------------------------


def checksum_reference(x: Any) -> int:
    """In plain Python: the sum of (2 i + 1) times the bits of element i, modulo 2^32."""
    array = np.asarray(x)
    words = array.astype(np.int32) if array.dtype == bool else array
    words = np.atleast_1d(words).view(f"u{min(words.dtype.itemsize, 4)}").ravel()
    return sum((2 * i + 1) * int(word) for i, word in enumerate(words)) % 2**32


CHECKED = {
    "f32": jnp.linspace(-3, 5, 24).reshape(2, 3, 4),
    "bf16": jnp.linspace(-3, 5, 24, dtype=jnp.bfloat16).reshape(4, 6),
    "int8": jnp.arange(-5, 5, dtype=jnp.int8),
    "bool": jnp.array([True, False, True]),
    "scalar": jnp.float32(2.5),
    "numpy_int64": np.array([2**50 + 3, -1]),
    "numpy_float64": np.array([[0.1, 2.0], [3.0, 4.0]]),
}


@pytest.mark.parametrize("x", CHECKED.values(), ids=CHECKED)
def test_checksum_equals_the_reference(x):
    assert snapshots.checksums({"x": x}).tolist() == [checksum_reference(x)]


def test_every_single_bit_changes_the_checksum():
    x = np.random.default_rng(0).normal(size=5).astype(np.float32)
    sums = set()
    for index in range(5):
        for bit in range(32):
            words = x.copy().view(np.uint32)
            words[index] ^= np.uint32(1 << bit)
            flipped = jnp.asarray(words.view(np.float32))
            sums.add(int(snapshots.checksums({"x": flipped})[0]))
    assert int(snapshots.checksums({"x": jnp.asarray(x)})[0]) not in sums


def test_the_checksum_does_not_depend_on_the_sharding():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in (("a", "b"), ("b", "a"), (None, "a"), (("a", "b"), None)):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert snapshots.checksums({"x": placed}).tolist() == [checksum_reference(x)]


def test_an_array_that_is_moved_changes_its_checksum():
    x = jnp.arange(6.0)
    assert snapshots.checksums({"x": x}) != snapshots.checksums({"x": x[::-1]})


def test_leaves_that_are_alike_share_a_program():
    """What is compiled grows with the kinds of leaves; the numbers come in the order of these."""
    rng = np.random.default_rng(0)
    leaves = {
        f"{i:03d}": jnp.asarray(rng.normal(size=(5, 7) if i % 3 else 11).astype(np.float32))
        for i in range(300)
    }
    leaves["007"] = leaves["007"].at[2, 3].set(jnp.nan)
    before = snapshots._checksums._cache_size(), snapshots._has_nan._cache_size()
    snapshot = snapshots.take(0, leaves, for_disk=True)
    assert snapshots._checksums._cache_size() - before[0] <= 4
    assert snapshots._has_nan._cache_size() - before[1] <= 4
    assert snapshot.sums.tolist() == [checksum_reference(x) for x in leaves.values()]
    assert snapshot.nan_leaves() == ([], ["007"])

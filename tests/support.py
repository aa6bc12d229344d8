"""What several test modules share: optimizers, a small problem, and comparison to the bit."""

import contextlib
import functools
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbw_optax import lbw_guard
from lbw_optax.state import GuardState, find_all

INNER = {
    "adam": lambda: optax.adam(0.05),
    "adamw": lambda: optax.adamw(0.05, weight_decay=1e-4),
    "sgd_momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "lion": lambda: optax.lion(0.02),
    "muon": lambda: optax.contrib.muon(0.05),
    "adafactor": lambda: optax.adafactor(0.05),
}
PLACEMENTS = {
    "wrapped": lambda inner: lbw_guard(inner),
    "chained": lambda inner: optax.chain(lbw_guard(), inner),
}


# As a user's program is compiled, whatever is quicker for tests: what `jax.jit` takes as
# `compiler_options` where two programs must round alike.
AS_USUAL: dict[str, Any] = {}
if sys.version_info < (3, 12):
    AS_USUAL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def slowly(*cases: Any) -> list[Any]:
    """Cases of a test that `make test-slow` runs; the others of the test are of their kind."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
        for case in cases
    ]


def environment(**more: str) -> dict[str, str]:
    """Of a process that a test starts: one device instead of the eight simulated ones."""
    return {**os.environ, "XLA_FLAGS": os.environ["LBW_TEST_XLA_FLAGS"], **more}


def free_port() -> int:
    """For the processes of a job to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def no_room(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Run(NamedTuple):
    """A transformation with its jitted update, shared by the tests that use the same one."""

    tx: optax.GradientTransformationExtraArgs
    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]

    def step(self, params: Any, state: Any, gradients: Any, value: Any) -> tuple[Any, Any]:
        updates, state = self.update(gradients, state, params, value=value)
        return apply_updates(params, updates), state


apply_updates = jax.jit(optax.apply_updates)


def run_of(tx: optax.GradientTransformation) -> Run:
    tx = optax.with_extra_args_support(tx)
    return Run(tx, jax.jit(tx.init), jax.jit(tx.update))


@functools.cache
def guarded(inner: str, **knobs: Any) -> Run:
    return run_of(lbw_guard(INNER[inner](), **knobs))


@functools.cache
def bare(inner: str) -> Run:
    return run_of(INNER[inner]())


@functools.cache
def chained(inner: str) -> Run:
    return run_of(PLACEMENTS["chained"](INNER[inner]()))


def small_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """A matrix, a vector and a scalar, with a negative zero among them."""
    weights = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3).at[1, 1].set(-0.0)
    return {
        "bias": jnp.array([-0.0, 0.5, 3.0], dtype),
        "gain": jnp.asarray(1.5, dtype),
        "weights": weights.astype(dtype),
    }


def gradients_of(params: Any) -> Any:
    """Of the quadratic loss sum (p - 1)^2 / 2, in the type of the parameters."""
    return jax.tree.map(lambda p: np.asarray(p - np.asarray(1, p.dtype)), jax.device_get(params))


def loss_of(params: Any) -> float:
    leaves = jax.tree.leaves(jax.device_get(params))
    return float(sum(np.square(np.asarray(p, np.float64) - 1).sum() for p in leaves) / 2)


def train(run: Run, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    """Healthy steps on the quadratic."""
    for _ in range(steps):
        value = np.float32(loss_of(params))
        params, state = run.step(params, state, gradients_of(params), value)
    return params, state


def storm(steps, every=1, bad=None, state=None):
    """States after each step of a run with a NaN gradient at every so many steps, or at these.

    From this state, or the first one.
    """
    run, params = guarded("sgd_momentum"), small_params()
    state, good = state or run.init(params), gradients_of(params)
    nan = jax.tree.map(lambda g: g * np.float32(np.nan), good)
    where = range(0, steps, every) if bad is None else bad
    for step in range(steps):
        _, state = run.update(nan if step in where else good, state, params, value=np.float32(1))
        yield step, state


def guard_in(state: Any) -> GuardState:
    return find_all(state)[0]


def bits(x: Any) -> np.ndarray:
    """The representation of an array as unsigned integers."""
    array = np.asarray(x)
    if array.dtype == bool:
        return array
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(actual)
    for (path, x), y in zip(paths, jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert jnp.asarray(x).dtype == jnp.asarray(y).dtype, name
        np.testing.assert_array_equal(bits(x), bits(y), err_msg=name)


def assert_all_finite(*trees: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            assert np.isfinite(np.asarray(leaf, np.float64)).all(), jax.tree_util.keystr(path)


def types(tree: Any) -> list[Any]:
    """Shape, dtype, weak type and sharding of every leaf."""
    return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


def refused(main: Callable[[list[str]], Any], arguments: list[str], capsys: Any) -> str:
    """What a command says, in one line, of arguments that it ends for with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said

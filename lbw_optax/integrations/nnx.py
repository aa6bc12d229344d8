"""Flax NNX: the activations of a model's layers, without a change to the model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lbw_optax.activations import Activations, Outliers, activation_outliers

# So many rows of what a layer gives are looked at, at even distances.
ROWS = 128
_NAME = "lbw_outliers"
# The classes of the layers are changed while a model is called: by one thread at a time.
_ALONE = threading.RLock()


class Watched(nnx.Intermediate):
    """What is kept of a layer while it is called."""


def watch(
    model: nnx.Module, is_layer: Callable[[str, nnx.Module], bool] | None = None
) -> Callable[..., tuple[Any, Activations]]:
    """A call of the model that gives (what it gives, activations), to be passed to `update`.

    Of each layer it is the outliers of 128 rows of its output (all axes but the last together are
    rows; of several outputs the first that is an array of floats). Called twice in one call of the
    model, the larger ones count. No gradient goes through them. It works inside ``nnx.jit``,
    ``nnx.grad``, ``nnx.remat`` and ``nnx.scan``, of whose layers it gives arrays.

    Args:
      model: any module of Flax NNX that is called.
      is_layer: from a path, as ``blocks/3``, and the module there, whether it is watched. By
        default those that stand in a list, and of a model without a list its direct children.

    Raises:
      ValueError: if there is no layer in the model.
      ImportError: with an older Flax, which has no ``nnx.capture``.

    Example:
      >>> import jax.numpy as jnp, lbw_optax, optax
      >>> from flax import nnx
      >>> from lbw_optax.integrations.nnx import watch
      >>> model = nnx.Sequential(*[nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3)])
      >>> def loss_fn(model, x):
      ...     y, activations = watch(model)(x)
      ...     return jnp.mean(y ** 2), activations
      >>> optimizer = nnx.Optimizer(model, lbw_optax.adamw(1e-3), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     gradient = nnx.value_and_grad(loss_fn, has_aux=True)
      ...     (loss, activations), grads = gradient(model, x)
      ...     optimizer.update(model, grads, value=loss, activations=activations)
      >>> train_step(model, optimizer, jnp.ones((4, 8)))
      >>> int(lbw_optax.metrics(optimizer.opt_state)["activation_layer"]) in range(3)
      True
    """
    if not hasattr(nnx, "capture"):
        raise ImportError("watch needs nnx.capture: pip install -U flax")
    layers = _layers(model, is_layer)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer to watch: pass is_layer=lambda path, module: ..."
        )

    def call(*args: Any, **kwargs: Any) -> tuple[Any, Activations]:
        with _ALONE, _sowing({type(module) for module in layers.values()}):
            given, found = nnx.capture(model, Watched)(*args, **kwargs)
        seen = {"/".join(map(str, path[:-1])): x[...] for path, x in nnx.to_flat_state(found)}
        # An axis before the pair is that of a scan.
        pairs = {path: jnp.moveaxis(seen[path], -1, 0) for path in layers if path in seen}
        return given, {path: Outliers(*pair) for path, pair in pairs.items()}

    return call


def _layers(
    model: nnx.Module, is_layer: Callable[[str, nnx.Module], bool] | None
) -> dict[str, nnx.Module]:
    found = {path: module for path, module in nnx.iter_modules(model) if path}
    named = {"/".join(map(str, path)): module for path, module in found.items()}
    if is_layer is not None:
        return {path: module for path, module in named.items() if is_layer(path, module)}
    in_lists = {p: m for p, m in found.items() if isinstance(p[-1], int) and not _is_list(m)}
    chosen = in_lists or {p: m for p, m in found.items() if len(p) == 1}
    return {"/".join(map(str, path)): module for path, module in chosen.items() if callable(module)}


def _is_list(module: nnx.Module) -> bool:
    return isinstance(module, nnx.List)


@contextmanager
def _sowing(kinds: set[type]) -> Iterator[None]:
    """Have modules of these classes keep outliers of what they give, while this lasts."""
    before = {kind: kind.__dict__.get("__call__") for kind in kinds}
    for kind in kinds:
        _set(kind, _sown(kind.__call__))
    try:
        yield
    finally:
        for kind, call in before.items():
            if call is None:
                del kind.__call__
            else:
                _set(kind, call)


def _set(kind: type, call: Any) -> None:
    kind.__call__ = call  # type: ignore[method-assign]


def _sown(call: Callable[..., Any]) -> Callable[..., Any]:
    def sown(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        given = call(self, *args, **kwargs)
        arrays = [x for x in jax.tree.leaves(given) if _is_floats(x)]
        # Not of another model with layers of the same class, which this one calls.
        if arrays and hasattr(self, "__captures__"):
            found = jnp.stack(activation_outliers(_some(arrays[0])))
            self.sow(Watched, _NAME, found, reduce_fn=jnp.maximum, init_fn=lambda: jnp.zeros(2))
        return given

    return sown


def _is_floats(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) and x.size > 0


def _some(x: jax.Array) -> jax.Array:
    rows = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1] if x.ndim else 1)
    return rows[:: len(rows) // ROWS | 1]

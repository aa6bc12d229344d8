"""One run for every training loop: gradients and losses that are given, whatever the parameters."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lbw_optax import lbw_guard
from lbw_optax.state import find

STEPS = 24
NAN_GRADIENT, NAN_LOSS, JUMP = 8, 12, 18
# It decides nothing; in a larger program XLA may fuse its sums, and round them, in another way.
ADVICE = ".law.classifier"


def needs(module: str, package: str) -> Any:
    """The module of another framework; without it the test module is skipped, with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"needs {package}: pip install {package}")


def optimizer() -> optax.GradientTransformationExtraArgs:
    return lbw_guard(optax.adamw(1e-2))


def first_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "bias": rng.normal(size=4).astype("f"),
        "kernel": rng.normal(size=(6, 4)).astype("f"),
    }


def batches() -> list[dict[str, Any]]:
    """Of each step the gradients and the loss: noise about a slope, and three faults."""
    rng = np.random.default_rng(2)
    found = []
    for step in range(STEPS):
        factor = np.float32({NAN_GRADIENT: np.nan, JUMP: 1e4}.get(step, 1))
        grads = {
            name: factor * (0.3 + rng.normal(size=p.shape)).astype("f")
            for name, p in first_params().items()
        }
        loss = np.float32(np.nan if step == NAN_LOSS else 3 - 0.05 * step)
        found.append({**grads, "loss": loss})
    return found


@jax.custom_vjp
def given(params: Any, batch: Any) -> jax.Array:
    """A loss function whose value and gradients are those of the batch, to the bit."""
    return batch["loss"]


def _forward(params: Any, batch: Any) -> Any:
    return batch["loss"], batch


def _backward(batch: Any, seed: jax.Array) -> Any:
    grads = {name: seed * batch[name] for name in ("bias", "kernel")}
    return grads, jax.tree.map(jnp.zeros_like, batch)


given.defvjp(_forward, _backward)


def gradients(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("bias", "kernel")}


def plain_loop(with_loss: bool = True) -> tuple[dict[str, np.ndarray], Any]:
    """Parameters and optimizer state at the end of the loop that Optax's manual shows."""
    tx, params = optimizer(), jax.tree.map(jnp.asarray, first_params())
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        extra_args = {"value": batch["loss"]} if with_loss else {}
        updates, state = tx.update(gradients(batch), state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    for batch in batches():
        params, state = step(params, state, batch)
    return params, state


def decided(state: Any) -> dict[str, np.ndarray]:
    """All that the guard in an optimizer state remembers, by name, without the inner state."""
    own = find(state)._replace(inner_state=None)
    leaves, _ = jax.tree_util.tree_flatten_with_path(own)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_decisions(state: Any, with_loss: bool = True) -> None:
    """To the bit as those of the plain loop, which met all three faults; advice to rounding."""
    _, expected = plain_loop(with_loss)
    found, wanted = decided(state), decided(expected)
    assert int(find(expected).law.control.skips) == 1 + with_loss
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()]
    assert [name for name in different if not name.startswith(ADVICE)] == []
    for name in different:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)

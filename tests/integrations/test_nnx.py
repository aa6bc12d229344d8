"""The activations of a user's own NNX module: by hand, under remat and scan, within a gradient."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lbw_optax
from lbw_optax.activations import Outliers, layer_names, stacked

if not hasattr(nnx, "capture"):
    pytest.skip("this Flax has no nnx.capture", allow_module_level=True)

from lbw_optax.integrations.nnx import watch

WIDTH, LAYERS, OUTLIER = 48, 3, 1
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, WIDTH)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.inner(x) / 8


class Model(nnx.Module):
    """Of three blocks, one of which has a channel that stands out."""

    def __init__(self, scan, remat):
        self.scan, self.remat = scan, remat
        keys = jax.random.split(jax.random.key(0), LAYERS)
        if scan:
            self.blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(keys)
            kernel = self.blocks.inner.kernel
            kernel[...] = kernel[...].at[OUTLIER, :, 7].multiply(100)
        else:
            self.blocks = nnx.List([Block(nnx.Rngs(key)) for key in keys])
            kernel = self.blocks[OUTLIER].inner.kernel
            kernel[...] = kernel[...].at[:, 7].multiply(100)

    def __call__(self, x):
        def apply(block, x):
            return x / jnp.abs(x).max() + block(x)

        apply = nnx.remat(apply) if self.remat else apply
        if self.scan:
            through = nnx.scan(
                lambda x, block: apply(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return through(x, self.blocks)
        for block in self.blocks:
            x = apply(block, x)
        return x


def loss_fn(model, x):
    y, activations = watch(model)(x)
    return jnp.mean(y**2), activations


@nnx.jit
def step(model, x):
    return nnx.value_and_grad(loss_fn, has_aux=True)(model, x)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_the_layer_with_an_outlier_is_named(scan, remat):
    model = Model(scan, remat)
    before = jax.tree.structure(nnx.state(model))
    (loss, activations), grads = step(model, X)
    (again, _), _ = step(model, X)
    assert layer_names(activations) == [f"blocks/{i}" for i in range(LAYERS)]
    peaks = np.asarray(stacked(activations).outliers.peak)
    assert peaks.argmax() == OUTLIER
    np.testing.assert_allclose(peaks, by_hand(Model(False, False)), rtol=1e-5)
    # The model is as it was, and nothing of it is left in its classes.
    assert jax.tree.structure(nnx.state(model)) == before
    assert jax.tree.structure(grads) == before
    plain = nnx.value_and_grad(lambda model: jnp.mean(model(X) ** 2))(model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), (loss, grads), plain
    )
    assert float(again) == float(loss)
    assert Block.__call__.__qualname__ == "Block.__call__"


def by_hand(model):
    x, peaks = X, []
    for block in model.blocks:
        added = np.asarray(block(x), np.float64)
        peaks.append(np.abs(added).max() / np.sqrt(np.mean(added**2)))
        x = x / jnp.abs(x).max() + block(x)
    return peaks


def test_a_layer_that_is_called_twice_gives_the_larger():
    class Twice(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0))])

        def __call__(self, x):
            return self.layers[0](x) + self.layers[0](jnp.ones((1, 4)))

    model, x = Twice(), jnp.eye(4)[:1]
    _, activations = watch(model)(x)
    peaks = [lbw_optax.activation_outliers(model.layers[0](y)).peak for y in (x, jnp.ones((1, 4)))]
    assert float(activations["layers/0"].peak) == pytest.approx(float(max(peaks)))


def test_a_teacher_of_the_same_class_is_left_as_it_is():
    """Which the model calls, and which is no part of it: under jit it could not be written to."""
    teacher = Model(False, False)

    class Student(Model):
        def __call__(self, x):
            return super().__call__(x) - teacher(x)

    found = nnx.jit(lambda model, x: watch(model)(x)[1])(Student(False, False), X)
    assert list(found) == [f"blocks/{i}" for i in range(LAYERS)]
    watch(Student(False, False))(X)
    assert not hasattr(teacher.blocks[0], "lbw_outliers")


def test_threads_do_not_take_each_others_layers():
    """A second one begins while the first is within its model."""
    within, call = threading.Barrier(2, timeout=0.5), Block.__call__
    found = []

    class Slow(Model):
        def __call__(self, x):
            with contextlib.suppress(threading.BrokenBarrierError):
                within.wait()  # in vain, where they go one by one
            return super().__call__(x)

    def run():
        found.append(len(watch(Slow(False, False))(X)[1]))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [LAYERS, LAYERS]
    assert Block.__call__ is call


def test_layers_are_chosen_by_path():
    _, activations = watch(Model(False, False), lambda path, _: path.endswith("2/inner"))(X)
    assert list(activations) == ["blocks/2/inner"]
    assert isinstance(activations["blocks/2/inner"], Outliers)
    with pytest.raises(ValueError, match="Model has no layer to watch: pass is_layer="):
        watch(Model(False, False), lambda path, _: False)

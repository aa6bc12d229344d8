"""Keras 3 on JAX: `fit` with an optimizer of Optax."""

import os

import jax
import loops
import numpy as np
import optax
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = loops.needs("keras", "keras")
if keras.backend.backend() != "jax":
    pytest.skip('needs KERAS_BACKEND="jax"', allow_module_level=True)

from lbw_optax import metrics  # noqa: E402
from lbw_optax.integrations.keras import OptaxOptimizer, PassesLoss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Given(PassesLoss, keras.Model):
    """The loss of `loops.given`; the batch comes as Keras has it, with a leading axis of one."""

    def __init__(self):
        super().__init__()
        for name, x in loops.first_params().items():
            value = self.add_weight(shape=x.shape, initializer="zeros", name=name)
            value.assign(x)
            setattr(self, name, value)

    def call(self, batch):
        return self.bias[None]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        params = {name: getattr(self, name).value for name in ("bias", "kernel")}
        return loops.given(params, {name: leaf[0] for name, leaf in x.items()})


def fitted(model, first=0, last=loops.STEPS):
    batches = [jax.tree.map(lambda x: np.asarray(x)[None], b) for b in loops.batches()[first:last]]
    data = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    model.fit(data, batch_size=1, shuffle=False, verbose=0)
    return model


def compiled():
    model = Given()
    model.compile(optimizer=OptaxOptimizer(loops.optimizer()))
    return model


def test_same_decisions_as_a_plain_loop():
    model = fitted(compiled())
    loops.assert_same_decisions(model.optimizer.state)
    params, _ = loops.plain_loop()
    np.testing.assert_array_equal(model.kernel.value, params["kernel"])


def test_a_run_that_is_saved_and_loaded_is_the_same_run(tmp_path):
    path, half = str(tmp_path / "run.weights.h5"), loops.STEPS // 2
    fitted(compiled(), 0, half).save_weights(path)
    model = fitted(compiled(), 0, 1)  # Keras makes the optimizer's variables when it trains
    model.load_weights(path)
    loops.assert_same_decisions(fitted(model, half).optimizer.state)


def line(model):
    """A line to learn, in `fit` as users have it; returns the losses of the epochs."""
    x = np.linspace(-1, 1, 64, dtype="f")[:, None]
    with jax.numpy_rank_promotion("allow"):  # of Keras's own layers
        return model.fit(x, 2 * x + 1, batch_size=16, epochs=30, verbose=0).history["loss"]


class Functional(PassesLoss, keras.Model):
    pass


class Sequential(PassesLoss, keras.Sequential):
    pass


def test_a_functional_and_a_sequential_model_learn():
    inputs = keras.Input((1,))
    for model in (
        Functional(inputs, keras.layers.Dense(1)(inputs)),
        Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
    ):
        model.compile(optimizer=OptaxOptimizer(loops.optimizer()), loss="mse")
        losses = line(model)
        assert losses[-1] < 0.5 * losses[0]
        assert float(metrics(model.optimizer.state)["loss"]) > 0


def test_an_optimizer_without_the_loss_is_an_optimizer():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer=OptaxOptimizer(optax.adamw(1e-2)), loss="mse")
    losses = line(model)
    assert losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_done_says_so(tmp_path):
    model = Given()
    model.compile(optimizer="adam")
    with pytest.raises(ValueError, match="compiled with Adam"):
        fitted(model)
    with pytest.raises(ValueError, match="is the Optax optimizer's"):
        OptaxOptimizer(optax.sgd(1e-2)).learning_rate = 0.1
    with pytest.raises(ValueError, match="save_weights"):
        OptaxOptimizer(optax.sgd(1e-2)).get_config()

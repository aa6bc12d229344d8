"""Keras 3 on JAX: three changed lines, marked, beside the imports."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
import optax

from lbw_optax import explain, lbw_guard
from lbw_optax.integrations.keras import OptaxOptimizer, PassesLoss

x = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")
y = np.sin(x.sum(axis=1, keepdims=True))


class Model(PassesLoss, keras.Model):  # <-- passes the loss on
    pass


inputs = keras.Input((8,))
hidden = keras.layers.Dense(64, activation="tanh")(inputs)
model = Model(inputs, keras.layers.Dense(1)(hidden))  # <-- was keras.Model
tx = lbw_guard(optax.adamw(1.0))
model.compile(optimizer=OptaxOptimizer(tx), loss="mse")  # <-- was optimizer="adamw"
loss = model.fit(x, y, batch_size=64, epochs=25, verbose=0).history["loss"][-1]
print(f"loss {loss:.3f}.", explain(model.optimizer.state))

"""Keras 3 on JAX: an optimizer of Optax as one of Keras, and models that pass the loss on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import optax

from lbw_optax.types import Loss, PyTree


class OptaxOptimizer(keras.optimizers.Optimizer):
    """An Optax optimizer as one of Keras, for ``model.compile`` on the JAX backend.

    The learning rate is Optax's: a number or a schedule there. Its state is saved with the model's
    weights (``keras.callbacks.ModelCheckpoint(..., save_weights_only=True)``).

    Args:
      tx: the Optax optimizer.
      name: as in Keras.

    Raises:
      ValueError: if Keras runs on another backend, or something sets the learning rate.
    """

    def __init__(self, tx: optax.GradientTransformation, name: str = "optax"):
        if keras.backend.backend() != "jax":
            raise ValueError(
                f"OptaxOptimizer needs Keras on JAX, and Keras runs on {keras.backend.backend()}: "
                'set the environment variable KERAS_BACKEND="jax" before keras is imported.'
            )
        super().__init__(learning_rate=1.0, name=name)  # it has to have one
        self._tx = optax.with_extra_args_support(tx)
        self._loss: Loss = None

    @property
    def state(self) -> PyTree:
        """The state of the Optax optimizer, for `lbw_optax.metrics` and the like.

        In a callback it is up to date after ``model.jax_state_sync()``.
        """
        return jax.tree.unflatten(self._structure, [v.value for v in self._state])

    @property
    def learning_rate(self) -> Any:
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, rate: Any) -> None:
        raise ValueError(
            "The learning rate is the Optax optimizer's: give it a schedule there. Callbacks of "
            "Keras that set the rate cannot be used with OptaxOptimizer."
        )

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make the optimizer's state for these variables."""
        super().build(variables)
        leaves, self._structure = jax.tree.flatten(self._tx.init([v.value for v in variables]))
        self._state = [self._variable(leaf, f"state_{i}") for i, leaf in enumerate(leaves)]

    def _variable(self, leaf: jax.Array, name: str) -> keras.Variable:
        return self.add_variable(
            shape=leaf.shape,
            initializer=lambda shape, dtype=None: leaf,
            dtype=leaf.dtype.name,
            name=name,
        )

    def stateless_apply(
        self,
        optimizer_variables: Sequence[jax.Array],
        grads: Sequence[jax.Array],
        trainable_variables: Sequence[jax.Array],
        loss: Loss = None,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """As in Keras; with the loss, a scalar, where it is known."""
        self._loss = loss
        try:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        finally:
            self._loss = None

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        """Of all variables at once. Keras leaves out those without a gradient: theirs is zero."""
        given = {
            self._get_variable_index(v): g for g, v in zip(grads, trainable_variables, strict=True)
        }
        params = [v.value for v in self._trainable_variables]
        whole = [given.get(i, jnp.zeros_like(p)) for i, p in enumerate(params)]
        extra_args = {} if self._loss is None else {"value": self._loss}
        updates, state = self._tx.update(whole, self.state, params, **extra_args)
        for variable, leaf in zip(self._state, jax.tree.leaves(state), strict=True):
            variable.assign(leaf)
        for variable, new in zip(
            self._trainable_variables, optax.apply_updates(params, updates), strict=True
        ):
            variable.assign(new)

    def get_config(self) -> Any:
        """An Optax optimizer is made of functions, which no file can hold."""
        raise ValueError(
            "An Optax optimizer cannot be written to a .keras file: save with "
            "model.save_weights(...), which holds its state, and compile the model again."
        )


class PassesLoss:
    """Put before a class of Keras's models, it passes the loss of a step on to the optimizer.

    ``class Model(PassesLoss, keras.Model): ...``, or before `keras.Sequential`; for models that
    `fit` trains with Keras's own train step, compiled with an :class:`OptaxOptimizer`.
    """

    def train_step(self: Any, state: Any, data: Any) -> Any:
        """Keras's own, but for the loss."""
        if not isinstance(self.optimizer, OptaxOptimizer):
            raise ValueError(
                f"This model passes its loss to an OptaxOptimizer, and was compiled with "
                f"{type(self.optimizer).__name__}: compile(optimizer=OptaxOptimizer(tx), ...), "
                "with auto_scale_loss=False under mixed_float16."
            )
        trainable, others, of_optimizer, of_metrics = state
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        value_and_grad = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        (_, (loss, predicted, others, of_metrics)), grads = value_and_grad(
            trainable,
            others,
            of_metrics,
            x,
            y,
            weight,
            training=True,
            optimizer_variables=of_optimizer,
        )
        trainable, of_optimizer = self.optimizer.stateless_apply(
            of_optimizer, grads, trainable, loss=loss
        )
        logs, of_metrics = self._update_metrics_variables(of_metrics, loss, x, y, predicted, weight)
        return logs, (trainable, others, of_optimizer, of_metrics)

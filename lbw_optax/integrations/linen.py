"""Flax linen: a `TrainState` that passes the loss on."""

from typing import Any, Self

import optax
from flax.training.train_state import TrainState

from lbw_optax.types import Loss, PyTree


class GuardedTrainState(TrainState):
    """Flax's `TrainState`, whose ``apply_gradients`` also takes the loss.

    Created and used as its parent. Any optimizer may be in it; one that takes no loss gets none.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lbw_optax import lbw_guard, metrics
      >>> from lbw_optax.integrations.linen import GuardedTrainState
      >>> loss = lambda p: jnp.sum((p["w"] - 1) ** 2)
      >>> tx = lbw_guard(optax.adamw(1e-2))
      >>> params = {"w": jnp.full(3, 2.0)}
      >>> state = GuardedTrainState.create(apply_fn=loss, params=params, tx=tx)
      >>> value, grads = jax.value_and_grad(loss)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=value)
      >>> print(metrics(state)["loss"])
      3.0
    """

    def apply_gradients(self, *, grads: PyTree, value: Loss = None, **changes: Any) -> Self:
        """As `TrainState.apply_gradients`.

        Args:
          grads: as there.
          value: the loss, a scalar; None where there is none.
          **changes: as there, other fields of the new state.
        """
        if value is None:
            return super().apply_gradients(grads=grads, **changes)
        tx = optax.with_extra_args_support(self.tx)

        def update(grads: PyTree, state: PyTree, params: PyTree = None) -> Any:
            return tx.update(grads, state, params, value=value)

        # The parent's own code, with an optimizer that knows the loss of this step.
        with_loss = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = TrainState.apply_gradients(with_loss, grads=grads, **changes)
        return stepped.replace(tx=self.tx)

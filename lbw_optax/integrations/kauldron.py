"""Kauldron: a train step that passes the loss on."""

import dataclasses
from typing import Any

import jax
import optax
from kauldron.train import context, train_step


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class GuardedTrainStep(train_step.TrainStep):
    """`kd.train.TrainStep`, which passes the loss on to the optimizer.

    ``kd.train.Trainer(..., optimizer=lbw_guard(optax.adamw(1e-3)), trainstep=GuardedTrainStep())``.
    """

    def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Kauldron's own, but for the loss."""
        before = context.Context.from_state_and_batch(state=state, batch=batch)
        differentiate = jax.grad(
            train_step.forward_with_loss, argnums=0, has_aux=True, allow_int=True
        )
        grads, seen = differentiate(
            before,
            model=self.model,
            losses=self.aux.losses,
            rngs=self.rng_streams.train_rngs(state.step),
            is_training=True,
        )
        tx = optax.with_extra_args_support(self.optimizer)
        updates, opt_state = tx.update(
            grads.params, state.opt_state, state.params, value=seen.loss_total
        )
        stepped = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            collections=seen.collections,
        )
        seen = seen.replace(grads=grads.params, updates=updates, opt_state=state.opt_state)
        return stepped, self.aux.update_context(seen)

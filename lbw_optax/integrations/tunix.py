"""Tunix: trainers that pass the loss on."""

from typing import Any

from tunix.sft import peft_trainer


class PassesLoss:
    """Put before a trainer of Tunix, it passes the loss of a step on to the optimizer.

    ``class GuardedDPO(PassesLoss, DPOTrainer): ...``; for any trainer that is a `PeftTrainer` and
    leaves its train step as it is.
    """

    def _train_step(self, model: Any, optimizer: Any, inputs: Any) -> Any:
        # Tunix knows the loss when it updates, and does not pass it: let it, and update afterwards.
        postponed = _Postponed()
        loss, *others = super()._train_step(model, postponed, inputs)  # type: ignore[misc]
        optimizer.update(*postponed.arguments, value=loss)
        return loss, *others


class GuardedPeftTrainer(PassesLoss, peft_trainer.PeftTrainer):
    """`PeftTrainer`, which passes the loss on to the optimizer.

    Created and used as its parent, with the guard as its optimizer:
    ``GuardedPeftTrainer(model, lbw_guard(optax.adamw(1e-4)), config)``.

    ``gradient_accumulation_steps`` of the config puts the guard inside the accumulation: it judges
    the mean of the gradients, and the loss of the last batch. Outside it judges each batch, and a
    bad one costs that batch alone: leave the setting out, and pass
    ``lbw_guard(optax.MultiSteps(optax.adamw(1e-4), 4))``; the config's steps then count batches.
    """


class _Postponed:
    """Stands for an optimizer, and keeps what it is to update with."""

    arguments: tuple[Any, ...]

    def update(self, *arguments: Any) -> None:
        self.arguments = arguments

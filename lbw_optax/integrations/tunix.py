"""Tunix: trainers that pass the loss on."""

from typing import Any

from tunix.sft import peft_trainer


class PassesLoss:
    """Put before a trainer of Tunix, it passes the loss of a step on to the optimizer.

    ``class GuardedDPO(PassesLoss, DPOTrainer): ...``; for any trainer that is a `PeftTrainer` and
    leaves its train step as it is.

    Raises:
      ValueError: with ``gradient_accumulation_steps`` in the config.
    """

    config: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        steps = self.config.gradient_accumulation_steps
        if steps is not None:
            raise ValueError(
                "With gradient_accumulation_steps Tunix puts the guard inside optax.MultiSteps, "
                "where one gradient that is not finite stays in the sum for good: leave the "
                "setting out, and accumulate inside the guard, "
                f"lbw_guard(optax.MultiSteps(optimizer, {steps}))."
            )

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

    To accumulate, ``lbw_guard(optax.MultiSteps(optax.adamw(1e-4), 4))``, and no
    ``gradient_accumulation_steps``: the guard judges each batch, and a bad one costs that batch
    alone. The steps of the config count batches then.
    """


class _Postponed:
    """Stands for an optimizer, and keeps what it is to update with."""

    arguments: tuple[Any, ...]

    def update(self, *arguments: Any) -> None:
        self.arguments = arguments

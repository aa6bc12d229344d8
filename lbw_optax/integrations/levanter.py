"""Levanter and Marin: an optimizer config whose optimizer is guarded."""

import dataclasses
from typing import Any

import optax
from levanter.optim.config import OptimizerConfig

from lbw_optax.guard import lbw_guard


def guarded(config: type[OptimizerConfig], **bounds: Any) -> type[OptimizerConfig]:
    """A class of optimizer configs as this one, whose optimizer is guarded.

    It has the fields of `config`, and Levanter's files know it as ``guarded_`` and the name of
    that: ``guarded(AdamConfig)`` is ``type: guarded_adam``. Levanter passes the loss itself.

    Args:
      config: a class of Levanter's optimizer configs.
      **bounds: as of :func:`lbw_optax.lbw_guard`.
    """

    def build(self: Any, num_train_steps: int) -> optax.GradientTransformationExtraArgs:
        return lbw_guard(config.build(self, num_train_steps), **bounds)

    namespace = {"build": build, "__doc__": f"`{config.__name__}`, guarded."}
    named = type(f"Guarded{config.__name__}", (config,), namespace)
    made: type[OptimizerConfig] = dataclasses.dataclass(frozen=True)(named)
    name = f"guarded_{OptimizerConfig.get_choice_name(config)}"
    return OptimizerConfig.register_subclass(name)(made)

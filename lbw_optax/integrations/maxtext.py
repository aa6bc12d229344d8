"""MaxText: its optimizers, guarded."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from lbw_optax.guard import lbw_guard


def guarded(get_optimizer: Callable[..., Any], **bounds: Any) -> Callable[..., Any]:
    """MaxText's factory of optimizers, whose optimizers are guarded.

    ``optimizers.get_optimizer = guarded(optimizers.get_optimizer)`` reaches its trainers but the
    one of reinforcement learning, which makes an optimizer of its own. With
    ``skip_step_on_spikes=True`` pre-training passes the loss on to the optimizer; its own skipping
    is left out then, for the guard does that.

    Args:
      get_optimizer: ``maxtext.optimizers.optimizers.get_optimizer``.
      **bounds: as of :func:`lbw_optax.lbw_guard`.
    """

    @functools.wraps(get_optimizer)
    def guarded_optimizer(
        config: Any, *args: Any, **kwargs: Any
    ) -> optax.GradientTransformationExtraArgs:
        return lbw_guard(get_optimizer(_WithoutSkipping(config), *args, **kwargs), **bounds)

    return guarded_optimizer


class _WithoutSkipping:
    """The config, with one setting of it off."""

    skip_step_on_spikes = False

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

"""Optimizers and learning-rate schedules by the names that the scripts' options have."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lbw_optax
from train.options import Options


def optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW after the schedule, with clipping before it and the guard above both as asked for.

    The optimizers without a guard have one that only observes, for what it reports and for the
    checkpoints that it vouches for. QK-clip comes last, on the parameters.

    >>> from pathlib import Path
    >>> options = Options("tiny", Path("runs/x"), optimizer="lbw+clip", steps=10)
    >>> state = optimizer(options).init({"w": 1.0})
    >>> lbw_optax.REGIMES[int(lbw_optax.metrics(state)["regime"])]
    'recovering'
    """
    tx: optax.GradientTransformation = optax.adamw(
        schedule(options), b1=options.b1, b2=options.b2, weight_decay=options.weight_decay
    )
    if options.optimizer.endswith("+clip"):
        tx = optax.chain(optax.clip_by_global_norm(options.clip), tx)
    governs = options.optimizer.startswith("lbw")
    tx = lbw_optax.lbw_guard(tx, mode="govern" if governs else "observe")
    if options.qk_clip is None:
        return tx
    layers = functools.partial(lbw_optax.by_attention, stacked="layers" if options.scan else None)
    return optax.chain(tx, lbw_optax.qk_clip(options.qk_clip, layers=layers))


def schedule(options: Options) -> optax.Schedule:
    """Linear warm-up from above zero to the peak, then constant, or to zero at the last step.

    Raises:
      ValueError: for a warm-up longer than the run.
    """
    if not 0 <= options.warmup < 1:
        raise ValueError(f"--warmup {options.warmup:g} is no share of the run in [0, 1)")
    peak, warmup = options.learning_rate, warmup_steps(options.warmup, options.steps)
    rest = max(options.steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[options.schedule]
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup]
    )


def warmup_steps(share: float, steps: int) -> int:
    """Steps in which the learning rate rises."""
    return round(share * steps)


def newest_rate(options: Options) -> Callable[[Any], jax.Array]:
    """A function from the optimizer's state to the learning rate of the newest update in it.

    The optimizer's own count decides: a step that the guard skipped has not advanced it.

    >>> from pathlib import Path
    >>> options = Options("tiny", Path("x"), learning_rate=0.5, schedule="constant", warmup=0.0)
    >>> print(newest_rate(options)(optimizer(options).init(jnp.ones(3))))
    0.5
    """
    rates = schedule(options)
    at = jax.jit(lambda count: jnp.asarray(rates(jnp.maximum(count - 1, 0)), jnp.float32))

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def rate(opt_state: Any) -> jax.Array:
        nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule)
        return at(next(node.count for node in nodes if is_schedule(node)))

    return rate

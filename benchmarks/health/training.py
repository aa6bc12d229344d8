"""One run of a sound task, step by step, so that all methods share one loop and few programs."""

import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lbw_optax
from benchmarks.health.methods import WARM_UP, Method
from benchmarks.health.task import Now, Task
from lbw_optax import GuardExhausted, RollbackManager, lbw_guard

POINTS = 10
"""The metric is the mean of so many, evenly over the last tenth of the run."""


class Run(NamedTuple):
    """All that a training run is, but for its data."""

    models: dict[str, Any]
    states: dict[str, Any]  # of the optimizers
    memory: Any
    steps: jax.Array  # int32, updates so far


class Seen(NamedTuple):
    """What a step shows of its guards; where there is none, of a run at full scale."""

    skipped: jax.Array  # share of the optimizers that skipped it
    exhausted: jax.Array  # bool, one of them can do no more
    scale: jax.Array  # the smallest


class Outcome(NamedTuple):
    """What became of a run."""

    metric: float
    calls: int  # steps that were computed, with those that a rollback undid
    skipped: float  # of these
    reasons: list[str]  # of its rollbacks
    ended: int | None  # the step at which the guard, or its manager, gave up
    scale: float  # the last


def train(task: Task, seed: int, method: Method) -> Outcome:
    """Train once; with a rollback under a manager with its defaults, in a temporary directory."""
    key = jax.random.key(seed)
    start, update, metric = _compiled(task, method.guarded, method.warmed_up)
    run, metrics = start(key), dict.fromkeys(measured_at(task.steps), jnp.float32(jnp.nan))

    def advance(batch: int, run: Run) -> Run:
        run, seen = update(key, np.int32(batch), run)
        parts.append(seen)
        return run

    def measure(step: int, run: Run) -> None:
        if step in metrics:  # anew after a rollback
            metrics[step] = metric(run.models)

    parts: list[Seen] = []
    reasons: list[str] = []
    gave_up = None
    if method.rollback:
        reasons, gave_up = _managed(task, run, advance, measure)
    else:
        _alone(task, run, advance, measure)
    seen = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(parts))
    if not method.rollback and seen.exhausted.any():
        gave_up = int(seen.exhausted.argmax()) + 1
    return Outcome(
        metric=float(np.mean(jax.device_get(list(metrics.values())))),
        calls=len(parts),
        skipped=float(seen.skipped.sum()),
        reasons=reasons,
        ended=gave_up,
        scale=float(seen.scale[-1]),
    )


def measured_at(steps: int) -> list[int]:
    """After which steps the metric is taken.

    >>> measured_at(1000)
    [910, 920, 930, 940, 950, 960, 970, 980, 990, 1000]
    """
    return sorted({steps - steps * i // (10 * POINTS) for i in range(POINTS)})


Advance = Callable[[int, Run], Run]
Measure = Callable[[int, Run], None]


def _alone(task: Task, run: Run, advance: Advance, measure: Measure) -> None:
    for step in range(task.steps):
        run = advance(step, run)
        measure(step + 1, run)


def _managed(
    task: Task, run: Run, advance: Advance, measure: Measure
) -> tuple[list[str], int | None]:
    """The reasons of the rollbacks, and the step at which the manager gave up."""
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
        RollbackManager(folder) as rollback,
    ):
        step, run = rollback.resume(run)
        gave_up = None
        while step < task.steps and gave_up is None:
            run = advance(rollback.data_step(step), run)
            try:
                step, run = rollback.step(step + 1, run)
                measure(step, run)
            except GuardExhausted:
                gave_up = step + 1
        return [r.reason for r in rollback.history], gave_up


# The programs


@functools.lru_cache(maxsize=4)
def _compiled(task: Task, guarded: bool, warmed_up: bool) -> tuple[Any, Any, Any]:
    """The start of a run from its key, an update, and the metric."""
    tx = task.optimizer(task.rate)
    if warmed_up:
        share = optax.linear_schedule(1 / WARM_UP, 1.0, WARM_UP - 1)
        tx = optax.chain(tx, optax.scale_by_schedule(share))
    tx = optax.with_extra_args_support(tx)
    tx = lbw_guard(tx) if guarded else tx

    def start(key: jax.Array) -> Run:
        models = task.start(jax.random.fold_in(key, 2**31 - 1))  # no batch has this index
        states = {name: tx.init(models[name]) for name in task.losses}
        return Run(models, states, task.memory(models), jnp.int32(0))

    def update(key: jax.Array, batch: jax.Array, run: Run) -> tuple[Run, Seen]:
        now = Now(run.steps, batch, jax.random.fold_in(key, batch), run.memory)
        models, states = dict(run.models), dict(run.states)
        for name, loss in task.losses.items():
            value, grads = jax.value_and_grad(loss)(models[name], models, now)
            updates, states[name] = tx.update(grads, states[name], models[name], value=value)
            models[name] = optax.apply_updates(models[name], updates)
        after = run.steps + 1
        memory = task.remember(run.memory, models, after)
        return Run(models, states, memory, after), _look(run.states, states, guarded)

    return _own_arrays(start), jax.jit(update), jax.jit(task.metric)


def _own_arrays(start: Callable[[jax.Array], Run]) -> Callable[[jax.Array], Run]:
    """The start as arrays on the device, whatever a task begins with."""
    return lambda key: jax.tree.map(jnp.array, start(key))


def _look(before: dict[str, Any], after: dict[str, Any], guarded: bool) -> Seen:
    if not guarded:
        return Seen(jnp.float32(0), jnp.bool(False), jnp.float32(1))
    old, new = ([lbw_optax.metrics(states[name]) for name in after] for states in (before, after))
    skipped = [b["skips"] - a["skips"] for a, b in zip(old, new, strict=True)]
    return Seen(
        jnp.mean(jnp.stack(skipped).astype(jnp.float32)),
        jnp.any(jnp.stack([m["exhausted"] for m in new])),
        jnp.min(jnp.stack([m["scale"] for m in new])),
    )

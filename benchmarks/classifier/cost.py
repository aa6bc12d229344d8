"""What a step of the classifier takes, compiled, with nothing else in the program."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from lbw_optax import law
from lbw_optax.law import classifier, telemetry
from lbw_optax.law.classifier import View
from lbw_optax.law.control import Bounds

STEPS, TIMES = 10_000, 7


def microseconds() -> dict[str, float]:
    """Of a step, the least of several times: as it is shipped, and learning in the run."""
    return {"shipped": _measured(adapts=False), "adapted": _measured(adapts=True)}


def _measured(*, adapts: bool) -> float:
    go, first = _program(adapts=adapts)
    losses = jnp.sin(jnp.arange(float(STEPS)))
    taken = []
    for _ in range(TIMES + 1):  # the first one compiles
        began = time.perf_counter()
        jax.block_until_ready(go(first, losses))
        taken.append(time.perf_counter() - began)
    return round(1e6 * min(taken[1:]) / STEPS, 2)


def _program(*, adapts: bool) -> Any:
    held, blank = law.init(Bounds()), telemetry.init()

    def one(memory: Any, loss: jax.Array) -> tuple[Any, jax.Array]:
        seen = blank._replace(loss=loss, has_loss=jnp.array(True))
        view = View(held.statistics, held.statistics, held.divergence, held.control.age, seen)
        memory = classifier.step(memory, view)
        return memory, memory.risk.soon

    return jax.jit(lambda first, x: jax.lax.scan(one, first, x)), classifier.init(adapts=adapts)

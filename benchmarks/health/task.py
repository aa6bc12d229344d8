"""What a sound task is, and the parts that many tasks share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any
Optimizer = Callable[[float], optax.GradientTransformation]


STEPS = 1000
"""Of a run, where a task says no other."""


class Now(NamedTuple):
    """What a loss may know of the step that it is computed in."""

    step: jax.Array  # int32, updates so far
    batch: jax.Array  # int32, index of the batch: the step, but for what a rollback has passed over
    key: jax.Array  # of this batch
    memory: Any  # what the task remembers besides its parameters, as a target network


@dataclass(frozen=True, eq=False)
class Task:
    """A run that is sound as it is.

    Several models may be trained, each on its own loss by an optimizer of its own, one after the
    other in every step; nearly always it is one. A name stands for its constants: whoever changes
    them gives the task another name, or deletes its records.
    """

    title: str
    unit: str  # of the metric
    higher: bool  # whether a larger metric is better
    steps: int
    rate: float
    optimizer: Optimizer
    start: Callable[[jax.Array], dict[str, Params]]
    losses: Mapping[str, Callable[[Params, dict[str, Params], Now], jax.Array]]
    metric: Callable[[dict[str, Params]], jax.Array]
    remember: Callable[[Any, dict[str, Params], jax.Array], Any]  # memory, models, updates so far
    memory: Callable[[dict[str, Params]], Any]
    allowed: float  # by how much the metric may be worse, as a share


def task(
    title: str,
    start: Callable[[jax.Array], Params],
    loss: Callable[[Params, Now], jax.Array],
    metric: Callable[[Params], jax.Array],
    *,
    rate: float,
    unit: str = "loss",
    higher: bool = False,
    steps: int = STEPS,
    optimizer: Optimizer = optax.adam,
    remember: Callable[[Any, Params, jax.Array], Any] | None = None,
) -> Task:
    """A task of one model. With `remember` the memory begins as its parameters."""
    return Task(
        title,
        unit,
        higher,
        steps,
        rate,
        optimizer,
        lambda key: {"model": start(key)},
        {"model": lambda own, models, now: loss(own, now)},
        lambda models: metric(models["model"]),
        lambda memory, models, step: remember(memory, models["model"], step) if remember else (),
        lambda models: models["model"] if remember else (),
        0.02,
    )


def falling(rate: float) -> optax.GradientTransformation:
    """Adam with a rate that falls to zero along a cosine, in a run of `STEPS`."""
    return optax.adam(optax.cosine_decay_schedule(rate, STEPS))


# Networks and losses


def mlp_start(key: jax.Array, *sizes: int) -> Params:
    """Layers of an MLP, each with the mean output of its input's size."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros((1, b))}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def mlp(layers: Params, x: jax.Array, activation: Any = jax.nn.relu) -> jax.Array:
    for layer in layers[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def digits(loss: jax.Array) -> jax.Array:
    """Decimal digits of a loss whose minimum is zero: those beyond the eighth are of no use."""
    return -jnp.log10(loss + 1e-8)


def at(values: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(values)[index]

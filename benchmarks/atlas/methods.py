"""What is compared on the atlas, in one table: to add a method, add a line to `METHODS`.

A method is a function from a `benchmarks.stress.regimes.Recipe` (the task's schedule and constants,
and the name of its optimizer) to an Optax transformation. The peers are the five that are best over
all cells of the stress benchmark (`benchmarks.stress.figure.best_peers`), at their published
constants. Those that are an Adam themselves run on tasks of AdamW only, or on all tasks where they
take no rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import optax

from benchmarks import peers
from benchmarks.atlas.draw import Task
from benchmarks.stress import methods as stress
from benchmarks.stress.regimes import Factory, Recipe
from lbw_optax import lbw_guard

OWN = "own"


class Method(NamedTuple):
    build: Factory
    title: str
    takes_lr: bool = True
    guarded: bool = False
    applies: Callable[[Task], bool] = lambda task: True


def own(recipe: Recipe) -> optax.GradientTransformation:
    """The task's optimizer, behind its clip."""
    clip = optax.identity() if recipe.clip is None else optax.clip_by_global_norm(recipe.clip)
    return optax.chain(clip, bare(recipe))


def bare(recipe: Recipe) -> optax.GradientTransformation:
    """The same without the clip."""
    rate, decay, betas = recipe.learning_rate, recipe.weight_decay, (recipe.b1, recipe.b2)
    if recipe.optimizer == "Lion":
        return optax.lion(rate, *betas, weight_decay=decay)
    if recipe.optimizer == "Muon":
        return optax.contrib.muon(rate, weight_decay=decay, adam_weight_decay=decay)
    if recipe.optimizer == "SGD":
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))
    if recipe.optimizer == "Adafactor":
        return optax.adafactor(rate)
    return optax.adamw(rate, *betas, weight_decay=decay)


def _is_adamw(task: Task) -> bool:
    return task.optimizer == "AdamW"


def _is_unclipped(task: Task) -> bool:
    """Where the task has the clip it is the task's own optimizer, which stands for it."""
    return task.clip is None


METHODS = {
    OWN: Method(own, "own optimizer"),
    "guard": Method(lambda r: lbw_guard(own(r)), "guard", guarded=True),
    "clip-1.0": Method(lambda r: own(r._replace(clip=1.0)), "clip 1.0", applies=_is_unclipped),
    "prodigy": Method(stress.prodigy, "Prodigy", takes_lr=False),
    "dadapt-adamw": Method(stress.dadapt_adamw, "D-Adapt AdamW", takes_lr=False),
    "momo-adam": Method(stress.momo_adam, "MoMo-Adam", applies=_is_adamw),
    "schedule-free": Method(stress.schedule_free, "schedule-free AdamW", applies=_is_adamw),
    "adagc": Method(lambda r: optax.chain(peers.adagc(), bare(r)), "AdaGC"),
}

QUICK = (OWN, "guard")

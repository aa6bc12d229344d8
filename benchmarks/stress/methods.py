"""Every method of the stress benchmark, in one table: to add one, add a line to `METHODS`.

A method is a function from a `benchmarks.stress.regimes.Recipe` (the regime's schedule, betas,
weight decay and clip) to an optimizer, at its published constants. In a regime with a clip every
method keeps it, except where clipping is the method itself.

The published constants are made for longer runs: the resets of SPAM (every 500 steps) and
Stable-SPAM (1000) are never reached here, AdaGC clips globally for its first 100 steps, and
skip-step and the update-norm clip wait for 64.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from benchmarks import peers
from benchmarks.stress import ablations
from benchmarks.stress.regimes import Recipe, ramp
from lbw_optax import lbw_guard


class Method(NamedTuple):
    build: Callable[[Recipe], optax.GradientTransformation]
    title: str
    takes_lr: bool = True
    guarded: bool = False
    regimes: tuple[str, ...] = ("lora", "full", "scratch", "recipe")
    control: bool = False  # no rival: it shows how far two runs of one method drift apart


def adamw(recipe: Recipe) -> optax.GradientTransformation:
    return optax.chain(_clip(recipe), bare_adamw(recipe))


def bare_adamw(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adamw(
        recipe.learning_rate, b1=recipe.b1, b2=recipe.b2, weight_decay=recipe.weight_decay
    )


def nudged_adamw(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW at a rate that differs in the last bits of float32.

    What comes out differs as two programs that round differently do: the noise of one cell.
    """

    def learning_rate(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return recipe.learning_rate(step) * (1 + 2.0**-22)

    return adamw(recipe._replace(learning_rate=learning_rate))


def warmup(recipe: Recipe) -> optax.GradientTransformation:
    return adamw(recipe._replace(learning_rate=ramp(recipe.peak, recipe.steps)))


def spam(recipe: Recipe) -> optax.GradientTransformation:
    return _finish(recipe, peers.scale_by_spam(recipe.b1, recipe.b2))


def stable_spam(recipe: Recipe) -> optax.GradientTransformation:
    return _finish(recipe, peers.scale_by_stable_spam(recipe.b1, recipe.b2))


def stable_adamw(recipe: Recipe) -> optax.GradientTransformation:
    return peers.stable_adamw(
        recipe.learning_rate, recipe.b1, recipe.b2, weight_decay=recipe.weight_decay
    )


def plateau(recipe: Recipe) -> optax.GradientTransformation:
    # Optax's constants, but for the loss: patience counts means of ten steps, not single steps,
    # for the loss of one small batch is no plateau.
    return optax.chain(adamw(recipe), optax.contrib.reduce_on_plateau(accumulation_size=10))


def momo_adam(recipe: Recipe) -> optax.GradientTransformation:
    momo = optax.contrib.momo_adam(
        recipe.learning_rate, b1=recipe.b1, b2=recipe.b2, weight_decay=recipe.weight_decay
    )
    return optax.chain(_clip(recipe), momo)


def prodigy(recipe: Recipe) -> optax.GradientTransformation:
    betas = (recipe.b1, recipe.b2)
    inner = optax.contrib.prodigy(recipe.shape, betas, weight_decay=recipe.weight_decay)
    return optax.chain(_clip(recipe), inner)


def dadapt_adamw(recipe: Recipe) -> optax.GradientTransformation:
    betas = (recipe.b1, recipe.b2)
    inner = optax.contrib.dadapt_adamw(recipe.shape, betas, weight_decay=recipe.weight_decay)
    return optax.chain(_clip(recipe), inner)


def schedule_free(recipe: Recipe) -> optax.GradientTransformation:
    # Schedule-free by its name: of the regime's schedule it keeps the warm-up only.
    inner = optax.contrib.schedule_free_adamw(
        recipe.undecayed, b1=recipe.b1, b2=recipe.b2, weight_decay=recipe.weight_decay
    )
    return optax.chain(_clip(recipe), inner)


def _clip(recipe: Recipe) -> optax.GradientTransformation:
    return optax.identity() if recipe.clip is None else optax.clip_by_global_norm(recipe.clip)


def _finish(
    recipe: Recipe, direction: optax.GradientTransformation
) -> optax.GradientTransformation:
    return optax.chain(
        direction,
        optax.add_decayed_weights(recipe.weight_decay),
        optax.scale_by_learning_rate(recipe.learning_rate),
    )


def _ablation(rules: ablations.Rules, title: str) -> Method:
    return Method(lambda r: ablations.guard_with(rules, adamw(r)), title, guarded=True)


CONSTANT = ("lora", "full", "scratch")

METHODS = {
    "adamw": Method(adamw, "AdamW"),
    "adamw-nudged": Method(nudged_adamw, "AdamW, rate × (1 + 2⁻²²)", control=True),
    "warmup": Method(warmup, "AdamW, linear warm-up", regimes=CONSTANT),
    "clip-1.0": Method(lambda r: adamw(r._replace(clip=1.0)), "clip 1.0", regimes=CONSTANT),
    "clip-0.5": Method(lambda r: adamw(r._replace(clip=0.5)), "clip 0.5"),
    "agc": Method(lambda r: optax.chain(optax.adaptive_grad_clip(0.01), bare_adamw(r)), "AGC"),
    "zclip": Method(lambda r: optax.chain(peers.zclip(), bare_adamw(r)), "ZClip"),
    "adagc": Method(lambda r: optax.chain(peers.adagc(), bare_adamw(r)), "AdaGC"),
    "spam": Method(spam, "SPAM"),
    "stable-spam": Method(stable_spam, "Stable-SPAM"),
    "stable-adamw": Method(stable_adamw, "StableAdamW"),
    "skip-step": Method(lambda r: peers.skip_step(adamw(r)), "skip-step 6σ/128"),
    "update-clip": Method(
        lambda r: optax.chain(adamw(r), peers.clip_by_update_history()), "update-norm clip 3σ/128"
    ),
    "plateau": Method(plateau, "reduce_on_plateau"),
    "momo-adam": Method(momo_adam, "MoMo-Adam"),
    "prodigy": Method(prodigy, "Prodigy", takes_lr=False),
    "dadapt-adamw": Method(dadapt_adamw, "D-Adapt AdamW", takes_lr=False),
    "schedule-free": Method(schedule_free, "schedule-free AdamW"),
    "guard": Method(lambda r: lbw_guard(adamw(r)), "guard", guarded=True),
    "guard-clip-1.0": Method(
        lambda r: lbw_guard(adamw(r._replace(clip=1.0))),
        "guard + clip 1.0",
        guarded=True,
        regimes=("lora",),
    ),
    "guard-chained": Method(
        lambda r: optax.chain(lbw_guard(), adamw(r)), "guard, chained before AdamW", guarded=True
    ),
    "guard-observe": Method(
        lambda r: lbw_guard(adamw(r), mode="observe"), "guard, observing", guarded=True
    ),
    "soft-start-alone": _ablation(ablations.SOFT_START_ALONE, "soft start without feedback"),
    "overshoot-alone": _ablation(ablations.OVERSHOOT_ALONE, "guard without a ceiling"),
    "ceiling-alone": _ablation(ablations.CEILING_ALONE, "guard without overshoot"),
}

QUICK = ("adamw", "clip-1.0", "stable-spam", "prodigy", "guard")

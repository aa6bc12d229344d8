"""What the fault benchmark compares, and the faults: to add one, add a line.

The learning rate is AdamW's, tuned on the valid split; everything else is at published constants.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import optax

from benchmarks import peers
from lbw_optax import lbw_guard
from lbw_optax.testing import Fault


class Method(NamedTuple):
    title: str
    build: Callable[[optax.Schedule], optax.GradientTransformation]
    guarded: bool = False
    rollback: bool = False


def guard(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return lbw_guard(optax.adamw(learning_rate))


METHODS = {
    "adamw": Method("AdamW", optax.adamw),
    "clip": Method(
        "AdamW, clip 1.0", lambda s: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(s))
    ),
    "apply-if-finite": Method(
        "apply_if_finite(5)", lambda s: optax.apply_if_finite(optax.adamw(s), 5)
    ),
    "skip-maxtext": Method(
        "skip-step 6σ/128, MaxText", lambda s: peers.maxtext_skip(optax.adamw(s))
    ),
    "skip-levanter": Method(
        "skip-step 6σ/128, Levanter", lambda s: peers.levanter_skip(optax.adamw(s))
    ),
    "zclip": Method("ZClip", lambda s: optax.chain(peers.zclip(), optax.adamw(s))),
    "guard": Method("guard", guard, guarded=True),
    "guard-rollback": Method("guard + rollback", guard, guarded=True, rollback=True),
}

STRUCK = 100
"""The step in which most faults strike."""


class Scenario(NamedTuple):
    """One fault, and how many steps the run is longer: those in which nothing could be learned."""

    title: str
    fault: Fault
    extra: int = 0


SCENARIOS = {
    "none": Scenario("no fault", Fault("none", 0)),
    "nan-loss": Scenario("NaN loss", Fault("nan_loss", STRUCK)),
    "inf-loss": Scenario("infinite loss", Fault("inf_loss", STRUCK)),
    "nan-gradient": Scenario("NaN in one gradient leaf", Fault("nan_gradient", STRUCK)),
    "inf-gradient": Scenario("Inf in one gradient leaf", Fault("inf_gradient", STRUCK)),
    "nan-activation": Scenario("NaN activation", Fault("nan_activation", STRUCK)),
    "nan-warmup": Scenario("NaN gradient in warm-up", Fault("nan_gradient", 2)),
    "nan-10": Scenario("NaN gradient, 10 in a row", Fault("nan_gradient", STRUCK, 10)),
    "nan-50": Scenario("NaN gradient, 50 in a row", Fault("nan_gradient", STRUCK, 50), 50),
    "nan-500": Scenario("NaN gradient, 500 in a row", Fault("nan_gradient", STRUCK, 500), 500),
    "random-1": Scenario("random tokens, 1 batch", Fault("random_tokens", STRUCK)),
    "random-10": Scenario("random tokens, 10 batches", Fault("random_tokens", STRUCK, 10)),
    "random-50": Scenario("random tokens, 50 batches", Fault("random_tokens", STRUCK, 50), 50),
    "one-token": Scenario("one token only, 10 batches", Fault("one_token", STRUCK, 10)),
    "labels": Scenario("shifted labels, 10 batches", Fault("shifted_labels", STRUCK, 10)),
    "gradient-1e3": Scenario("gradient ×10³", Fault("scaled_gradient", STRUCK, size=1e3)),
    "gradient-1e6": Scenario("gradient ×10⁶", Fault("scaled_gradient", STRUCK, size=1e6)),
    "flip-parameter": Scenario("parameter, top exponent bit", Fault("flipped_parameter", STRUCK)),
    "flip-parameter-low": Scenario(
        "parameter, an exponent bit (×2³² or back)", Fault("flipped_parameter", STRUCK, size=3)
    ),
    "flip-mu": Scenario("Adam's mu, top exponent bit", Fault("flipped_mu", STRUCK)),
    "flip-mu-low": Scenario(
        "Adam's mu, an exponent bit (×2¹⁶ or back)", Fault("flipped_mu", STRUCK, size=4)
    ),
    "flip-nu": Scenario("Adam's nu, top exponent bit", Fault("flipped_nu", STRUCK)),
    "flip-nu-sign": Scenario("Adam's nu, sign bit", Fault("flipped_nu", STRUCK, size=0)),
    "lr-10": Scenario("learning rate ×100, 10 steps", Fault("learning_rate", STRUCK)),
    "lr-50": Scenario("learning rate ×100, 50 steps", Fault("learning_rate", STRUCK, 50)),
    "drift": Scenario("learning rate drifts to ×130", Fault("drift", STRUCK)),
    "shift-3": Scenario("lasting level shift ×3", Fault("level_shift", STRUCK, size=3)),
    "shift-25": Scenario("lasting level shift ×25", Fault("level_shift", STRUCK)),
    "false-alarm": Scenario("adversary: false alarms", Fault("false_alarm", STRUCK)),
    "stealth": Scenario("adversary: under the thresholds", Fault("stealth", STRUCK)),
}

DRAWN = ("nan-10", "flip-mu", "lr-10", "random-10")
DRAWN_METHODS = ("adamw", "guard", "guard-rollback")
"""What the figure shows the loss of."""

MIX_STEPS, MIX_EVERY = 500, 250
"""An episode of the mix, and the steps to one fault, on average."""
# Of the lasting faults those that an episode can hold.
MIXED = [name for name in SCENARIOS if name not in ("none", "nan-warmup", "nan-500", "random-50")]


def mix(seed: int) -> list[Fault]:
    """A random mix of faults: a Poisson number of them, each of any kind at any time.

    No fault strikes in the last 50 steps, for nothing could be told of a recovery.
    """
    draw = np.random.default_rng([seed, 2605])
    times = sorted(draw.integers(0, MIX_STEPS - 50, size=draw.poisson(MIX_STEPS / MIX_EVERY)))
    names = draw.choice(MIXED, size=len(times))
    return [
        replace(SCENARIOS[name].fault, at=int(at), seed=int(draw.integers(2**31)))
        for name, at in zip(names, times, strict=True)
    ]

"""Made-up runs, as the law sees them: their signals step by step, and the law run over them."""

import math

import jax
import numpy as np
from reference import Signals

from lbw_optax import law
from lbw_optax.law import telemetry
from lbw_optax.law.control import Bounds, Control, Decision

LENGTH = 400
BOUNDS = Bounds()


@jax.jit
def scan(seen: telemetry.Telemetry, bounds: Bounds):
    """The law's state and its decision in every step."""

    def step(state, one):
        state, decision = law.step(state, one, bounds)
        return state, (state, decision)

    return jax.lax.scan(step, law.init(bounds), seen)[1]


def run_law(seen, bounds=BOUNDS) -> tuple[Control, Decision]:
    state, decision = jax.device_get(scan(seen, bounds))
    return state.control, decision


def nothing_seen(steps: int) -> telemetry.Telemetry:
    return jax.tree.map(lambda x: np.zeros([steps, *x.shape], x.dtype), telemetry.init())


def batch(steps: list[Signals]) -> telemetry.Telemetry:
    """Signals as the arrays that the law reads; a missing one keeps its last value."""
    seen = nothing_seen(len(steps))
    flags = {
        "gradient_norm": seen.has_gradient,
        "overshoot": seen.has_overshoot,
        "relative_step": seen.has_step,
        "loss": seen.has_loss,
    }
    for i, step in enumerate(steps):
        for name, x in vars(step).items():
            field = getattr(seen, name)
            field[i] = x if x is not None else field[max(i - 1, 0)]
            if name in flags:
                flags[name][i] = x is not None
    return seen


def noisy(length=LENGTH, seed=0, **changes) -> list[Signals]:
    """A healthy run: falling loss and gradient, steps about the right length."""
    rng = np.random.default_rng(seed)
    steps = []
    for t in range(length):
        healthy = {
            "gradient_norm": math.exp(rng.normal(0, 0.2)) * (1 + 4 / (1 + t)),
            "overshoot": float(rng.normal(0.02, 0.05)),
            "relative_step": 0.004 * math.exp(rng.normal(0, 0.3)),
            "loss": 3 + 4 / (1 + t / 30) + float(rng.normal(0, 0.05)),
        }
        steps.append(Signals(**{k: float(np.float32(x)) for k, x in healthy.items()}))
    return steps


def change(steps, where, **signals):
    for i in where:
        vars(steps[i]).update(signals)
    return steps


def shifted(factor):
    steps = noisy()
    for step in steps[200:]:
        step.gradient_norm *= factor
    return steps


def stormy(seed):
    """Everything at once, at random."""
    rng = np.random.default_rng(seed)
    steps = noisy(seed=seed)
    faults = [
        {"nonfinite_gradients": 7, "gradient_norm": None, "overshoot": None},
        {"nonfinite_loss": 1, "loss": None},
        {"nonfinite_updates": 2, "relative_step": None},
        {"gradient_norm": 1e5},
        {"gradient_norm": None},
        {"gradient_norm": 0.0, "overshoot": None},
        {"loss": 90.0},
        {"overshoot": 0.9},
        {"relative_step": 0.4},
        {"overshoot": None, "relative_step": None},
        {"loss": None},
    ]
    for step in steps:
        if rng.random() < 0.15:
            vars(step).update(faults[rng.integers(len(faults))])
    return steps


TRAJECTORIES = {
    "healthy": noisy(),
    "overshooting": change(noisy(), range(150, 250), overshoot=0.08, relative_step=0.03),
    "long_steps": change(noisy(), range(100, 400), relative_step=0.05),
    "short_steps": change(noisy(), range(400), overshoot=-0.35, relative_step=0.05),
    "nan_gradients": change(
        noisy(), [0, 5, *range(100, 110)], nonfinite_gradients=3, gradient_norm=None
    ),
    "nan_losses": change(noisy(), [1, 50, 51], nonfinite_loss=1, loss=None),
    "nonfinite_updates": change(noisy(), [30], nonfinite_updates=4, relative_step=None),
    "gradient_spikes": change(noisy(), [60, 200, 201], gradient_norm=1e6),
    "loss_spikes": change(noisy(), [60, 64, 200, 209, 219], loss=60.0),
    "level_shift_3": shifted(3),
    "level_shift_25": shifted(25),
    "level_shift_1e6": shifted(1e6),
    "no_loss": change(noisy(), range(400), loss=None),
    "no_overshoot": change(noisy(), range(400), overshoot=None),
    "no_parameters": change(noisy(), range(400), relative_step=None),
    "nothing_measured": change(noisy(), range(400), overshoot=None, relative_step=None, loss=None),
    "zero_gradients": change(noisy(), range(100, 200), gradient_norm=0.0, overshoot=None),
    "negative_loss": change(noisy(), range(200, 400), loss=-5.0),
    "all_bad": change(noisy(), range(10, 400), nonfinite_gradients=1, gradient_norm=None),
    **{f"stormy_{seed}": stormy(seed) for seed in range(4)},
}


def risen(to: float, start=200, end=400, seed=0) -> list[Signals]:
    """The loss at a higher level, with the noise it had."""
    steps = noisy(seed=seed)
    for step in steps[start:end]:
        step.loss = float(np.float32(step.loss + to))
    return steps


def falling(to: float, start: int, seed=0) -> list[Signals]:
    """Risen while it falls by more than its noise in three steps."""
    steps = risen(to, start=start, seed=seed)
    for i, step in enumerate(steps):
        step.loss += 0.02 * (len(steps) - i)
    return steps


DIVERGING = TRAJECTORIES | {
    "corrupt_parameters": change(noisy(), [150], parameters_broken=True),
    "corrupt_moment": change(noisy(), range(150, 160), updates_broken=True),
    "nonfinite_updates_only": change(noisy(), range(80, 90), nonfinite_updates=1),
    "loss_up_3": risen(3.0),
    "loss_up_1": risen(1.0),
    "loss_up_while_it_falls": falling(2.0, start=60),
    "loss_up_for_a_while": risen(2.0, 200, 203),
    "loss_drifts_up": [
        Signals(**vars(s) | {"loss": s.loss + 0.01 * max(0, i - 150)})
        for i, s in enumerate(noisy())
    ],
    "skips_in_a_row": change(noisy(), range(100, 400), gradient_norm=None),
    "first_gradient": change(noisy(), [0], gradient_norm=1e4),
    "zero_after_the_first": change(noisy(), [1, 2], gradient_norm=0.0),
}

"""Short training runs, thousands of them: small tasks of the atlas × rates × faults.

A setting is one small task and one optimizer; its runs (lanes) differ in learning rate, seed and
fault, and go through one compiled program side by side. Which settings train the
classifier and which judge it is decided here, by family and by optimizer: those that judge it have
a family, or an optimizer, that it has never seen.
"""

from typing import NamedTuple

import numpy as np

from benchmarks.atlas.draw import Task

STEPS, LANES = 300, 24
# Families and optimizers that train it; all others judge it.
SEEN = ("decoder", "convolution", "classifier", "regression")
SEEN_OPTIMIZERS = ("AdamW", "SGD", "Adafactor")
UNSEEN = ("recurrence", "experts", "diffusion", "sequence")
UNSEEN_OPTIMIZERS = ("Lion", "Muon")
BLOCKS = {
    "decoder": ("pre-norm", "post-norm", "QK-norm", "parallel"),
    "experts": ("pre-norm",),
    "recurrence": ("associative",),
    "convolution": ("residual", "plain"),
    "classifier": ("residual", "plain"),
    "diffusion": ("adaptive",),
    "sequence": ("sort", "reverse"),
    "regression": ("plain", "residual"),
}
TEXT = ("decoder", "experts", "recurrence")
SEQUENCES = (*TEXT, "convolution", "diffusion", "sequence")

# A run's learning rate over the usual one of its optimizer, as powers of ten.
LOWEST, HIGHEST = -1.0, 3.0
# What befalls a run, and how likely that is: nothing, one bad batch or a few of them (gradients, or
# loss and gradients, times a size), a level that shifts for good, a rate that jumps or drifts, a
# NaN, a broken parameter.
FAULTS = {
    "none": 0.34,
    "scaled_gradient": 0.12,
    "hard_batch": 0.16,
    "level_shift": 0.06,
    "learning_rate": 0.12,
    "drift": 0.08,
    "nan_gradient": 0.04,
    "nan_loss": 0.02,
    "broken_weights": 0.06,
}
TITLES = {
    "none": "nothing; the rate is 0.1 to 1000 times the usual one",
    "scaled_gradient": "gradients × 10 to 10⁵, 1 to 3 steps",
    "hard_batch": "loss and gradients × 1.6 to 20, 1 to 3 steps",
    "level_shift": "loss and gradients × 0.3 to 5, for good",
    "learning_rate": "learning rate × 3 to 300, 5 to 60 steps",
    "drift": "learning rate × 1.02 to 1.1 each step",
    "nan_gradient": "NaN in the gradient",
    "nan_loss": "NaN in the loss",
    "broken_weights": "first matrix × 3 to 10⁴",
}
BROKEN = ("nan_gradient", "nan_loss", "broken_weights")
"""Faults of the state, or of the numbers."""


class Lanes(NamedTuple):
    """The runs of one setting, an entry each."""

    rate: np.ndarray  # over the usual one
    seed: np.ndarray
    fault: np.ndarray  # str
    at: np.ndarray
    length: np.ndarray
    size: np.ndarray


def settings(split: str) -> list[Task]:
    """The settings that train ("train"), choose ("valid") or judge ("unseen") the classifier."""
    if split in ("train", "valid"):
        number = {"train": 72, "valid": 12}[split]
        rng = np.random.default_rng([19, number])
        return [
            _draw(rng, SEEN[i % 4], SEEN_OPTIMIZERS[(i // 4) % 3], f"{split}{i:02d}")
            for i in range(number)
        ]
    rng = np.random.default_rng([19, 99])
    families = [
        _draw(rng, UNSEEN[i % 4], SEEN_OPTIMIZERS[i // 4], f"family{i:02d}") for i in range(8)
    ]
    both = [
        _draw(rng, (*UNSEEN, *SEEN)[i], UNSEEN_OPTIMIZERS[i % 2], f"both{i:02d}") for i in range(8)
    ]
    return families + both


def lanes(task: Task) -> Lanes:
    """What befalls the runs of a setting: a pure function of the setting."""
    rng = np.random.default_rng([20, task.seed])
    fault = rng.choice(list(FAULTS), size=LANES, p=list(FAULTS.values()))
    short = rng.integers(1, 4, LANES)
    lengths = {
        "level_shift": np.full(LANES, STEPS),
        "learning_rate": rng.integers(5, 60, LANES),
        "drift": np.full(LANES, 150),
        "broken_weights": np.ones(LANES, int),
    }
    ones = np.ones(LANES)
    sizes = {
        "scaled_gradient": 10 ** rng.uniform(1, 5, LANES),
        "hard_batch": 10 ** rng.uniform(0.2, 1.3, LANES),
        "level_shift": 10 ** rng.uniform(-0.5, 0.7, LANES),
        "learning_rate": 10 ** rng.uniform(0.5, 2.5, LANES),
        "drift": rng.uniform(1.02, 1.1, LANES),
        "broken_weights": 10 ** rng.uniform(0.5, 4, LANES),
    }
    pick = np.arange(LANES)
    return Lanes(
        rate=10 ** rng.uniform(LOWEST, HIGHEST, LANES),
        seed=rng.integers(2**31, size=LANES),
        fault=fault,
        at=rng.integers(30, STEPS - 60, LANES),
        length=np.array([lengths.get(fault[i], short)[i] for i in pick]),
        size=np.array([sizes.get(fault[i], ones)[i] for i in pick], np.float32),
    )


def _draw(rng: np.random.Generator, family: str, optimizer: str, name: str) -> Task:
    text = family in TEXT
    return Task(
        name=f"{name}-{family}-{optimizer}",
        half="",
        family=family,
        block=str(rng.choice(BLOCKS[family])),
        width=int(rng.choice([16, 24])),
        depth=int(rng.integers(1, 3)),
        batch=int(rng.choice([4, 8] if family in SEQUENCES else [16, 32, 64])),
        length=16 if family in SEQUENCES else 1,
        vocabulary={"sequence": 16, "diffusion": 16, "regression": 1}.get(family, 10)
        if not text
        else 256,
        steps=STEPS,
        optimizer=optimizer,
        b2=float(rng.choice([0.95, 0.99, 0.999])) if optimizer != "Lion" else 0.99,
        weight_decay=0.0 if optimizer in ("SGD", "Adafactor") else float(rng.choice([0.0, 0.1])),
        clip=None if rng.random() < 0.7 else 1.0,
        schedule=str(rng.choice(["constant", "cosine", "WSD"])),
        warmup=float(rng.choice([0.0, 0.02, 0.1])),
        init=str(rng.choice(["standard", "zero output"])),
        layout="matrices",
        dtype="float32",
        start="scratch",
        rank=0,
        shift="–",
        seed=int(rng.integers(2**31)),
    )

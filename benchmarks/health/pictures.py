"""Ten classes of small pictures: what handwritten digits are good for, without a data set.

A class has two smooth prototypes of 8 x 8 pixels. A picture is one of them, moved by a pixel or not
along each axis, with noise; some pictures are hard.
"""

import functools
from typing import NamedTuple

import numpy as np

CLASSES, SIDE, KINDS = 10, 8, 2
TRAIN, HELD_OUT = 3000, 1000
NOISE = 0.3


class Pictures(NamedTuple):
    """Pixels, float32[number, 64], and classes, int32[number]."""

    x: np.ndarray
    y: np.ndarray

    def of(self, wanted: np.ndarray) -> "Pictures":
        return Pictures(self.x[wanted], self.y[wanted])


@functools.cache
def pictures() -> tuple[Pictures, Pictures]:
    """Those to train on, and those held out.

    >>> [part.x.shape for part in pictures()]
    [(3000, 64), (1000, 64)]
    """
    rng = np.random.default_rng(16)
    prototypes = _smooth(rng.normal(size=(CLASSES, KINDS, SIDE, SIDE)))
    return _draw(rng, prototypes, TRAIN), _draw(rng, prototypes, HELD_OUT)


def _draw(rng: np.random.Generator, prototypes: np.ndarray, number: int) -> Pictures:
    y = rng.integers(CLASSES, size=number)
    clean = prototypes[y, rng.integers(KINDS, size=number)]
    moved = [np.roll(c, tuple(rng.integers(2, size=2)), axis=(0, 1)) for c in clean]
    noisy = np.stack(moved) + NOISE * rng.normal(size=clean.shape)
    return Pictures(noisy.reshape(number, -1).astype(np.float32), y.astype(np.int32))


def _smooth(x: np.ndarray) -> np.ndarray:
    """A mean over neighbours, with pixels between 0 and about 1."""
    near = np.sum([np.roll(x, by, axis) for by in (-1, 0, 1) for axis in (-1, -2)], axis=0)
    spread = near.std(axis=(-2, -1), keepdims=True)
    return np.clip(0.5 + 0.35 * near / spread, 0, None)

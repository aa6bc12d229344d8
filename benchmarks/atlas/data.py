"""What each task is trained and judged on: text as bytes or small BPE, or data made by seed.

All data of a task are a finite pool of examples, from which the batches are drawn by seed, and a
validation set that no run is trained on.

A fine-tuned task has a base, which is trained first. Its `shift` says on what: "none" is the same
text, at a constant rate, so that there is something left to learn; "near" is the source code of
Python's standard library and the first tenth of the text, and the run reads the other nine; "far"
is that code alone. Where there is no data directory the text is that library itself: "near" is its
first tenth, and for "far" its vocabulary is permuted.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.atlas.draw import Task
from benchmarks.atlas.models import INPUTS
from benchmarks.stress.bench import fingerprint
from benchmarks.tasks import noisy_pictures
from train import corpora, data

BYTES, EXAMPLES, JUDGED = 256, 4096, 512
EVALUATED = (2048, 8192)
"""Validation targets of a task on text: a sixth of those it is trained on, between these."""


class Pool(NamedTuple):
    """Examples along the first axis of each array."""

    train: Any
    valid: Any


class Text(NamedTuple):
    """Token ids of the splits, of the code that a base reads, and a digest of all of them."""

    train: np.ndarray
    valid: np.ndarray
    code: np.ndarray
    digest: str


def pool(task: Task, directory: str | Path | None) -> Pool:
    """What the task itself is trained on."""
    if task.family in _MADE:
        return _MADE[task.family](task)
    found = text(directory, task.vocabulary)
    known = len(found.train) // 10 if task.shift == "near" else 0
    return _windows(task, found.train[known:], found.valid)


def base_pool(task: Task, directory: str | Path | None) -> Pool:
    """What the base of a fine-tuned task is trained on."""
    found = text(directory, task.vocabulary)
    if task.shift == "none":
        return _windows(task, found.train, found.valid)
    if task.shift == "near":
        known = found.train[: len(found.train) // 10]
        code = found.code if directory is not None else found.code[:0]
        return _windows(task, np.concatenate([known, code]), found.valid)
    if directory is None:
        other = np.random.default_rng(task.seed).permutation(task.vocabulary).astype(np.int32)
        return _windows(task, other[found.train], other[found.valid])
    cut = len(found.code) // 10
    return _windows(task, found.code[cut:], found.code[:cut])


def batches(task: Task, examples: Any, seed: int, steps: int) -> Any:
    """All batches of a run: arrays of shape (steps, batch, ...), a pure function of the seed."""
    size = len(jax.tree.leaves(examples)[0])
    index = np.random.default_rng([task.seed, seed]).integers(size, size=(steps, task.batch))
    return jax.tree.map(lambda array: np.ascontiguousarray(array[index]), examples)


@functools.cache
def text(directory: str | Path | None, vocabulary: int) -> Text:
    """The corpus in a vocabulary of bytes (256) or of byte-level BPE."""
    code = corpora.standard_library()["train"]
    if vocabulary != BYTES:
        corpus = data.load(directory, vocab_size=vocabulary)
        train, valid = np.asarray(corpus.train), np.asarray(corpus.valid)
        return Text(train, valid, data.encode(corpus.tokenizer, code), fingerprint(corpus))
    texts = _texts(directory)
    splits = {split: _bytes(texts[split]) for split in ("train", "valid")}
    digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens in splits.values()))
    return Text(splits["train"], splits["valid"], _bytes(code), digest.hexdigest()[:16])


def _texts(directory: str | Path | None) -> corpora.Texts:
    if directory is None:
        return corpora.standard_library()
    return corpora.text_directory(Path(directory))


def _bytes(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\n".join(texts).encode(), np.uint8).astype(np.int32)


def _windows(task: Task, train: np.ndarray, valid: np.ndarray) -> Pool:
    def windows(tokens: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(tokens, task.length + 1)

    apart = windows(valid)[:: task.length]
    # Spread over all of the split, for neighbours are alike.
    targets = np.clip(task.batch * task.length * task.steps // 6, *EVALUATED)
    count = min(int(targets) // task.length, len(apart))
    return Pool(windows(train), apart[:: len(apart) // count][:count])


def _pictures(task: Task) -> Pool:
    """Ten smooth patterns, each shifted a little, under noise, and a tenth of the labels wrong."""
    rng = np.random.default_rng(task.seed)
    waves = rng.standard_normal((task.vocabulary, 4, 4)) + 1j * rng.standard_normal((10, 4, 4))
    patterns = np.fft.ifft2(waves, s=(16, 16)).real
    patterns /= patterns.std((1, 2), keepdims=True)

    def make(count: int, wrong: float) -> dict[str, np.ndarray]:
        label = rng.integers(task.vocabulary, size=count)
        moves = rng.integers(4, size=(2, count, 1, 1))
        row, column = np.mgrid[:16, :16]
        moved = patterns[label[:, None, None], (row + moves[0]) % 16, (column + moves[1]) % 16]
        noisy = moved + rng.standard_normal(moved.shape)
        return _labelled(rng, noisy, label, wrong, task.vocabulary)

    return Pool(make(EXAMPLES, 0.1), make(JUDGED, 0.1))


def _vectors(task: Task) -> Pool:
    """The classes that a random two-layer network gives to normal vectors, a tenth wrong."""
    rng = np.random.default_rng(task.seed)
    inner = rng.standard_normal((INPUTS, 64)) / np.sqrt(INPUTS)
    outer = rng.standard_normal((64, task.vocabulary))

    def make(count: int) -> dict[str, np.ndarray]:
        x = rng.standard_normal((count, INPUTS))
        label = (np.tanh(2 * x @ inner) @ outer).argmax(-1)
        return _labelled(rng, x, label, 0.1, task.vocabulary)

    return Pool(make(4 * EXAMPLES), make(4 * JUDGED))


def _labelled(
    rng: np.random.Generator, x: np.ndarray, label: np.ndarray, wrong: float, classes: int
) -> dict[str, np.ndarray]:
    other = rng.integers(classes, size=label.shape)
    label = np.where(rng.random(label.shape) < wrong, other, label)
    return {"x": x.astype(np.float32), "y": label.astype(np.int32)}


def _curve(task: Task) -> Pool:
    """A sum of waves in a few directions, and noise of a tenth of its size."""
    rng = np.random.default_rng(task.seed)
    inner = rng.standard_normal((INPUTS, 8)) / np.sqrt(INPUTS)

    def make(count: int) -> dict[str, np.ndarray]:
        x = rng.standard_normal((count, INPUTS))
        y = np.sin(2 * x @ inner).sum(-1) / 2 + 0.1 * rng.standard_normal(count)
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}

    return Pool(make(4 * EXAMPLES), make(4 * JUDGED))


def _noisy(task: Task) -> Pool:
    rng = np.random.default_rng(task.seed)
    return Pool(noisy_pictures(rng, EXAMPLES), noisy_pictures(rng, JUDGED))


def _questions(task: Task) -> Pool:
    """A row of symbols, a mark, and the row sorted or reversed: int32 of `length` + 1."""
    rng = np.random.default_rng(task.seed)
    asked = task.length // 2

    def make(count: int) -> np.ndarray:
        row = rng.integers(1, task.vocabulary, size=(count, asked))
        answer = np.sort(row) if task.block == "sort" else row[:, ::-1]
        return np.concatenate([row, np.zeros((count, 1), int), answer], 1).astype(np.int32)

    return Pool(make(4 * EXAMPLES), make(JUDGED))


_MADE = {
    "convolution": _pictures,
    "classifier": _vectors,
    "regression": _curve,
    "diffusion": _noisy,
    "sequence": _questions,
}

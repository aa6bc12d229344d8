"""The weights of the classifier, from examples: seeded, and the same on the same machine."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.classifier.examples import Examples
from lbw_optax.law import classifier
from lbw_optax.law.classifier import CELLS, HORIZONS, INPUTS, Weights

PIECE = 300
"""Runs are cut into pieces of so many steps."""
EPOCHS, BATCH, PEAK, DECAY = 200, 64, 2e-2, 1e-3
# A run may be logged without norms, and most logs know nothing of the overshoot: these inputs are
# hidden in such shares of the pieces.
NORMS, WAYS = [5, 6, 7, 12], [8, 9, 10, 13]
HIDDEN_NORMS, HIDDEN_WAYS = 0.2, 0.4
# How much the kinds weigh beside the two probabilities.
KINDS = 0.1


def train(examples: Sequence[Examples], seed: int = 0) -> Weights:
    """Weights that minimise the cross-entropy of both probabilities and of the kinds.

    All steps count alike, so that the probabilities are what they say; a kind counts by how rare it
    is, for how often each occurs here says nothing of a run.
    """
    pieces = [piece for x in examples for piece in _pieces(x)]
    inputs, asked, until, kind = (np.concatenate(x) for x in zip(*pieces, strict=True))
    rng = np.random.default_rng(seed)
    count = len(inputs) // BATCH
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(PEAK, EPOCHS * count), weight_decay=DECAY),
    )
    told = kind[kind >= 0]
    share = np.bincount(told, minlength=3) / max(len(told), 1)
    balance = jnp.asarray(1 / np.maximum(3 * share, 1e-3), jnp.float32)
    weights = _first(rng)
    state = tx.init(weights)
    update = functools.partial(_update, tx, balance)
    for _ in range(EPOCHS):
        order = rng.permutation(len(inputs))[: count * BATCH].reshape(count, BATCH)
        for rows in order:
            x = inputs[rows] * _shown(rng)[:, None]
            weights, state = update(weights, state, x, asked[rows], until[rows], kind[rows])
    return jax.tree.map(np.asarray, weights)


def _pieces(x: Examples) -> list[tuple[np.ndarray, ...]]:
    """Whole runs, cut; what is asked of nothing is left out."""
    parts = []
    for start in range(0, x.asked.shape[1], PIECE):
        cut = [a[:, start : start + PIECE] for a in (x.inputs, x.asked, x.until, x.kind)]
        short = PIECE - cut[0].shape[1]
        fill = [0.0, False, 0, -1]
        padded = [
            np.pad(a, [(0, 0), (0, short)] + [(0, 0)] * (a.ndim - 2), constant_values=value)
            for a, value in zip(cut, fill, strict=True)
        ]
        some = padded[1].sum(1) > 20
        parts.append(tuple(a[some] for a in padded))
    return parts


def _shown(rng: np.random.Generator) -> np.ndarray:
    shown = np.ones((BATCH, INPUTS), np.float32)
    for places, share in ((NORMS, HIDDEN_NORMS), (WAYS, HIDDEN_WAYS)):
        shown[np.ix_(np.flatnonzero(rng.random(BATCH) < share), np.array(places))] = 0
    return shown


def _first(rng: np.random.Generator) -> Weights:
    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    # The unit begins by keeping what it knows.
    bias = np.concatenate([np.ones(CELLS), np.zeros(2 * CELLS)])
    first = np.array([-5.0, -4.0, 0.0, 0.0, 0.0])
    return Weights(
        normal(INPUTS, 3 * CELLS),
        normal(CELLS, 3 * CELLS),
        jnp.asarray(bias, jnp.float32),
        0.1 * normal(CELLS, 5),
        jnp.asarray(first, jnp.float32),
        alarm=jnp.ones([], jnp.float32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _update(
    tx: Any, balance: Any, weights: Weights, state: Any, x: Any, asked: Any, until: Any, kind: Any
) -> Any:
    def loss(weights: Weights) -> jax.Array:
        held = jax.vmap(functools.partial(cells, weights))(x)
        logits = classifier.read_out(weights, held)
        soon = [(until > 0) & (until <= horizon) for horizon in HORIZONS]
        losses = sum(
            jnp.sum(jnp.where(asked, optax.sigmoid_binary_cross_entropy(logits[..., i], y), 0.0))
            for i, y in enumerate(soon)
        ) / jnp.maximum(jnp.sum(asked), 1)
        known = kind >= 0
        right = jnp.maximum(kind, 0)
        of_kind = optax.softmax_cross_entropy_with_integer_labels(logits[..., 2:], right)
        of_kind = jnp.where(known, of_kind * balance[right], 0.0)
        return losses + KINDS * jnp.sum(of_kind) / jnp.maximum(jnp.sum(known), 1)

    updates, state = tx.update(jax.grad(loss)(weights), state, weights)
    return optax.apply_updates(weights, updates), state


def cells(weights: Weights, inputs: jax.Array) -> jax.Array:
    """The cells after each step of a run, float32[steps, 16], from its inputs."""

    def one(held: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
        held = classifier.advance(weights, held, found)
        return held, held

    return jax.lax.scan(one, jnp.zeros(CELLS, jnp.float32), inputs)[1]

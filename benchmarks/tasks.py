"""Small models of other kinds than the stress benchmark's decoder, each with its own data.

`TASKS` names them: a mixture of experts and a linear recurrence on text, and a diffusion
transformer on drawn pictures. Each is shown to the guard as it is, with nothing adapted to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train import data

WIDTH, HEADS, LAYERS, LENGTH, BATCH, VOCABULARY = 64, 4, 2, 64, 8, 512
EXPERTS, CHOSEN = 8, 2
SIDE, PATCH = 16, 4


class Task(NamedTuple):
    """A model to train: its parameters from a seed, a loss, and batches from (seed, step)."""

    title: str
    init: Callable[[int], Any]
    loss: Callable[[Any, jax.Array], jax.Array]
    batch: Callable[[int, int], np.ndarray]
    held_out: np.ndarray


def tasks(corpus: data.Corpus) -> dict[str, Task]:
    """All tasks; those on text read `corpus`, whose vocabulary has `VOCABULARY` tokens."""
    attention, recurrence = _Attention, _Recurrence
    return {
        "experts": _text_task(corpus, "mixture of experts", attention, _Experts),
        "recurrence": _text_task(corpus, "linear recurrence", recurrence, _SwiGLU),
        "diffusion": _diffusion_task(),
        "decoder": _text_task(corpus, "decoder", attention, _SwiGLU),
    }


def _text_task(corpus: data.Corpus, title: str, mixer: type, mlp: type) -> Task:
    def build(seed: int) -> nnx.Module:
        return _Language(mixer, mlp, rngs=nnx.Rngs(seed))

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        logits, balance = model(tokens[:, :-1])
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked) + 0.01 * balance

    def batch(seed: int, step: int) -> np.ndarray:
        return data.sample(corpus.train, seed, step, batch_size=BATCH, length=LENGTH)

    held_out = data.sample(corpus.valid, 0, 0, batch_size=64, length=LENGTH)
    return _task(title, build, loss, batch, held_out)


def _diffusion_task() -> Task:
    """Predict the noise in a noisy picture; a batch stacks picture, noise, and noise level."""

    def loss(model: Any, batch: jax.Array) -> jax.Array:
        pictures, noise, level = batch[:, 0], batch[:, 1], batch[:, 2, :1, :1]
        # The angle of a variance-preserving mix: 0 is the picture, 1 the noise.
        noisy = jnp.cos(level * jnp.pi / 2) * pictures + jnp.sin(level * jnp.pi / 2) * noise
        return jnp.mean(jnp.square(model(noisy, level[:, 0, 0]) - noise))

    def batch(seed: int, step: int) -> np.ndarray:
        return noisy_pictures(np.random.default_rng([seed, step]), 4 * BATCH)

    held_out = noisy_pictures(np.random.default_rng(2**31), 256)
    return _task(
        "diffusion transformer", lambda seed: _Denoiser(rngs=nnx.Rngs(seed)), loss, batch, held_out
    )


def noisy_pictures(rng: np.random.Generator, number: int) -> np.ndarray:
    """Ellipses in [-1, 1], noise, and a noise level: float32 of shape (number, 3, SIDE, SIDE).

    >>> noisy_pictures(np.random.default_rng(0), 2).shape
    (2, 3, 16, 16)
    """
    centre = rng.uniform(4, SIDE - 4, (2, number, 1, 1))
    radius = rng.uniform(2, 6, (2, number, 1, 1))
    row, column = np.mgrid[:SIDE, :SIDE]
    inside = ((row - centre[0]) / radius[0]) ** 2 + ((column - centre[1]) / radius[1]) ** 2 < 1
    level = np.broadcast_to(rng.uniform(0, 1, (number, 1, 1)), inside.shape)
    noise = rng.standard_normal(inside.shape)
    return np.stack([np.where(inside, 1.0, -1.0), noise, level], axis=1).astype(np.float32)


def _task(title: str, build: Callable[[int], nnx.Module], loss: Any, batch: Any, held: Any) -> Task:
    graph, _ = nnx.split(build(0))

    def init(seed: int) -> Any:
        return nnx.to_pure_dict(nnx.state(build(seed)))

    return Task(title, init, lambda params, x: loss(nnx.merge(graph, params), x), batch, held)


class _Language(nnx.Module):
    """Token ids to logits, and the sum of what the blocks say about their balance."""

    def __init__(self, mixer: type, mlp: type, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=_INIT, rngs=rngs)
        self.places = nnx.Param(_INIT(rngs.params(), (LENGTH, WIDTH)))
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2 * LAYERS + 1)])
        self.mixers = nnx.List([mixer(rngs=rngs) for _ in range(LAYERS)])
        self.mlps = nnx.List([mlp(rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, balance = self.embed(tokens) + self.places[...][None], jnp.float32(0)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            change, uneven = mlp(self.norms[2 * i + 1](x))
            x, balance = x + change, balance + uneven
        return self.embed.attend(self.norms[-1](x)), balance


class _Attention(nnx.Module):
    """Self-attention, causal unless told otherwise."""

    def __init__(self, *, causal: bool = True, rngs: nnx.Rngs):
        self.causal = causal
        self.qkv, self.out = _linear(WIDTH, 3 * WIDTH, rngs), _linear(WIDTH, WIDTH, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.reshape(x.shape))


class _Recurrence(nnx.Module):
    """h_t = f_t h_{t-1} + (1 - f_t) v_t with a forget gate per channel, by a parallel scan.

    Source: minGRU, arXiv 2410.01201.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.parts, self.out = _linear(WIDTH, 3 * WIDTH, rngs), _linear(WIDTH, WIDTH, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        forget, value, gate = jnp.split(self.parts(x), 3, axis=-1)
        keep = jax.nn.sigmoid(forget + 2.0)

        def join(left: Any, right: Any) -> Any:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, h = jax.lax.associative_scan(join, (keep, (1 - keep) * value), axis=1)
        return self.out(h * jax.nn.silu(gate))


class _SwiGLU(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.gate, self.up = (_linear(WIDTH, 3 * WIDTH, rngs) for _ in range(2))
        self.down = _linear(3 * WIDTH, WIDTH, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x)), jnp.float32(0)


class _Experts(nnx.Module):
    """The best two of eight MLPs for every token, and the Switch load-balancing loss.

    Every expert is computed and the others are weighed 0, which is exact and simple at this size.
    Source: Switch Transformers, arXiv 2101.03961, eq. 4.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.router = _linear(WIDTH, EXPERTS, rngs)
        self.up = nnx.Param(_INIT(rngs.params(), (EXPERTS, WIDTH, WIDTH)))
        self.down = nnx.Param(_INIT(rngs.params(), (EXPERTS, WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        share = jax.nn.softmax(self.router(x))
        best, index = jax.lax.top_k(share, CHOSEN)
        chosen = jax.nn.one_hot(index, EXPERTS)
        weight = jnp.einsum("blk,blke->ble", best / best.sum(-1, keepdims=True), chosen)
        hidden = jax.nn.silu(jnp.einsum("blw,ewh->bleh", x, self.up[...]))
        y = jnp.einsum("bleh,ehw,ble->blw", hidden, self.down[...], weight)
        uneven = EXPERTS * jnp.sum(chosen.mean((0, 1, 2)) * share.mean((0, 1)))
        return y, uneven


class _Denoiser(nnx.Module):
    """Patches, blocks whose norms are shifted and scaled by the noise level, patches.

    Source: adaptive layer norm of DiT, arXiv 2212.09748, section 3.2.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.enter = _linear(PATCH * PATCH, WIDTH, rngs)
        self.leave = nnx.Linear(
            WIDTH, PATCH * PATCH, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        self.places = nnx.Param(_INIT(rngs.params(), ((SIDE // PATCH) ** 2, WIDTH)))
        self.level = nnx.List([_linear(WIDTH, 4 * WIDTH, rngs) for _ in range(LAYERS)])
        self.mixers = nnx.List([_Attention(causal=False, rngs=rngs) for _ in range(LAYERS)])
        self.mlps = nnx.List([_SwiGLU(rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, noisy: jax.Array, level: jax.Array) -> jax.Array:
        frequency = 2.0 ** jnp.arange(WIDTH // 2) ** 0.5
        angle = jnp.pi * level[:, None] * frequency[None]
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        x = self.enter(_patches(noisy)) + self.places[...][None]
        for modulate, mixer, mlp in zip(self.level, self.mixers, self.mlps, strict=True):
            shift, scale, shift_mlp, scale_mlp = jnp.split(modulate(waves)[:, None], 4, axis=-1)
            x = x + mixer(_normed(x) * (1 + scale) + shift)
            x = x + mlp(_normed(x) * (1 + scale_mlp) + shift_mlp)[0]
        return _picture(self.leave(_normed(x)))


def _patches(pictures: jax.Array) -> jax.Array:
    grid = SIDE // PATCH
    cut = pictures.reshape(-1, grid, PATCH, grid, PATCH).swapaxes(2, 3)
    return cut.reshape(-1, grid * grid, PATCH * PATCH)


def _picture(patches: jax.Array) -> jax.Array:
    grid = SIDE // PATCH
    return patches.reshape(-1, grid, grid, PATCH, PATCH).swapaxes(2, 3).reshape(-1, SIDE, SIDE)


def _normed(x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-6)


_INIT = nnx.initializers.normal(0.02)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.lecun_normal()
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

"""The models of the atlas: one small function a family, from weights and a batch to a loss.

A model is a dict of arrays. `shapes` says which a task has, `init` draws them, and `loss` reads
them. Between what is trained and what the functions below read stands `weights`, in which the
parametrisation, the layout of the axes, the adapters and the precision are undone: so the families
know of none of these.

Initialisation is normal with variance 1/inputs, embeddings 0.02 (1 with "muP"), and "zero output"
sets the last matrix of every branch and of the model to zero. "muP" trains weights that all start
at variance 1 and multiplies them in the forward pass, by 1/√inputs, and the output by 1/inputs, as
u-μP does (arXiv 2407.17465): it is muP-like in that one rate fits all widths.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.atlas.draw import Task

Weights = dict[str, jax.Array]

HEAD = 32
"""Width of an attention head; narrower models have one head."""
EXPERTS, CHOSEN = 4, 2
SIDE, PATCH = 16, 4
INPUTS = 32
"""Of the classifier and the regression."""


class Leaf(NamedTuple):
    """Shape of a weight matrix, and what it is: embedding, hidden, last of a branch, output, ...

    `heads` is the axis that attention heads divide.
    """

    shape: tuple[int, ...]
    kind: str = "hidden"
    heads: int | None = None


def init(task: Task, seed: int) -> Weights:
    """What is trained from scratch, as the task lays it out."""
    rng = np.random.default_rng([seed, 1])
    first = {
        name: (_first(task, leaf, rng) / _factor(task, leaf)).astype(np.float32)
        for name, leaf in shapes(task).items()
    }
    return {name: jnp.asarray(array) for name, array in _laid_out(task, first).items()}


def weights(task: Task, trained: Weights) -> Weights:
    """The matrices a family computes with, in the precision of the task."""
    flat = _flat(task, trained)
    leaves = shapes(task)
    return {name: (w * _factor(task, leaves[name])).astype(task.dtype) for name, w in flat.items()}


def adapters(task: Task, seed: int) -> Weights:
    """LoRA factors for every matrix within the layers; the second starts at zero."""
    rng = np.random.default_rng([seed, 2])
    factors: Weights = {}
    for name, leaf in shapes(task).items():
        if name[0].isdigit() and leaf.kind in ("hidden", "last"):
            *stack, inputs, outputs = leaf.shape
            first = rng.standard_normal((*stack, inputs, task.rank)) / math.sqrt(inputs)
            factors[f"{name}.A"] = jnp.asarray(first, jnp.float32)
            factors[f"{name}.B"] = jnp.zeros((*stack, task.rank, outputs))
    return factors


def adapted(frozen: Weights, factors: Weights) -> Weights:
    """W + 2 A B, as with alpha = 2 rank."""
    changes = {
        name[:-2]: 2.0 * first @ factors[name[:-2] + ".B"]
        for name, first in factors.items()
        if name.endswith(".A")
    }
    return {name: w + changes[name] if name in changes else w for name, w in frozen.items()}


def loss(task: Task, trained: Weights, batch: Any, *, evaluating: bool = False) -> jax.Array:
    """Mean loss of a batch, a float32 scalar; `evaluating` leaves out what only trains."""
    found, extra = _FAMILIES[task.family](task, weights(task, trained), batch)
    return found if evaluating else found + extra


def shapes(task: Task) -> dict[str, Leaf]:
    """The matrices of a model by their names; those of layer 3 begin with ``3.``."""
    width = task.width
    enter, layer, leave = _PARTS[task.family](task)
    layers = {f"{i}.{name}": leaf for i in range(task.depth) for name, leaf in layer.items()}
    return {**enter, **layers, "leave": Leaf((width, task.vocabulary), "output"), **leave}


# Parameters


def _first(task: Task, leaf: Leaf, rng: np.random.Generator) -> np.ndarray:
    """With NumPy: as a program of JAX it would take longer to compile than a run takes."""
    if leaf.kind in ("gain", "bias"):
        return np.full(leaf.shape, float(leaf.kind == "gain"))
    if task.init == "zero output" and leaf.kind in ("last", "output"):
        return np.zeros(leaf.shape)
    small = leaf.kind == "embedding" and task.init != "muP"
    inputs = 1 if leaf.kind == "embedding" else _inputs(leaf)
    deviation = 0.02 if small else 1 / math.sqrt(inputs)
    if task.init == "muP" and leaf.kind == "output":
        deviation = 1 / inputs
    return deviation * rng.standard_normal(leaf.shape)


def _factor(task: Task, leaf: Leaf) -> float:
    """By which a trained weight is multiplied to be the matrix that is computed with."""
    if task.init != "muP" or leaf.kind in ("gain", "bias", "embedding"):
        return 1.0
    inputs = _inputs(leaf)
    return 1 / inputs if leaf.kind == "output" else 1 / math.sqrt(inputs)


def _inputs(leaf: Leaf) -> int:
    """Those that an output sums: of a convolution (3, 3, in, out) nine times as many."""
    return math.prod(leaf.shape[:-1]) if leaf.shape[:2] == (3, 3) else leaf.shape[-2]


def _laid_out(task: Task, flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if task.layout == "heads":
        return {name: w.reshape(_by_heads(shapes(task)[name])) for name, w in flat.items()}
    if task.layout == "stacked":
        names = [name[2:] for name in flat if name.startswith("0.")]
        stacked = {n: np.stack([flat[f"{i}.{n}"] for i in range(task.depth)]) for n in names}
        return {n: w for n, w in flat.items() if not n[0].isdigit()} | stacked
    return flat


def _flat(task: Task, trained: Weights) -> Weights:
    """The inverse of `_laid_out`."""
    leaves = shapes(task)
    if task.layout == "stacked":
        return {
            name: trained[name.partition(".")[2]][int(name.partition(".")[0])]
            if name[0].isdigit()
            else trained[name]
            for name in leaves
        }
    return {name: trained[name].reshape(leaf.shape) for name, leaf in leaves.items()}


def _by_heads(leaf: Leaf) -> tuple[int, ...]:
    if leaf.heads is None:
        return leaf.shape
    size = leaf.shape[leaf.heads]
    parts = (size // HEAD, HEAD) if size % HEAD == 0 else (1, size)
    return (*leaf.shape[: leaf.heads], *parts, *leaf.shape[leaf.heads + 1 :])


# Families


def _decoder(task: Task, w: Weights, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A causal transformer; `task.block` says where its norms stand."""
    x = w["embed"][tokens[:, :-1]] + w["places"][None]
    balance = jnp.float32(0)
    for i in range(task.depth):
        p = _of_layer(w, i)
        if task.block == "post-norm":
            x = _norm(x + _attention(task, p, x), p["norm1"])
            x = _norm(x + _mlp(p, x), p["norm2"])
        elif task.block == "parallel":
            y = _norm(x, p["norm1"])
            x = x + _attention(task, p, y) + _mlp(p, y)
        else:
            x = x + _mixer(task, p, _norm(x, p["norm1"]))
            y = _norm(x, p["norm2"])
            change, uneven = _experts(p, y) if task.family == "experts" else (_mlp(p, y), 0.0)
            x, balance = x + change, balance + uneven
    logits = _norm(x, w["norm"]) @ w["leave"]
    return _cross_entropy(logits, tokens[:, 1:]), 0.01 * balance


def _sequence(task: Task, w: Weights, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same on a question and its answer, of which the answer alone is learned."""
    asked = tokens.shape[1] // 2
    x = w["embed"][tokens[:, :-1]] + w["places"][None]
    for i in range(task.depth):
        p = _of_layer(w, i)
        x = x + _attention(task, p, _norm(x, p["norm1"]))
        x = x + _mlp(p, _norm(x, p["norm2"]))
    logits = (_norm(x, w["norm"]) @ w["leave"])[:, asked:]
    return _cross_entropy(logits, tokens[:, 1 + asked :]), jnp.float32(0)


def _diffusion(task: Task, w: Weights, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Predict the noise in a noisy picture; norms are shifted and scaled by the noise level.

    Source: DiT, arXiv 2212.09748, section 3.2.
    """
    pictures, noise, level = batch[:, 0], batch[:, 1], batch[:, 2, :1, :1]
    noisy = jnp.cos(level * jnp.pi / 2) * pictures + jnp.sin(level * jnp.pi / 2) * noise
    frequency = jnp.geomspace(1.0, 64.0, task.width // 2)[None]
    angle = level[:, :, 0] * jnp.pi * frequency
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1).astype(task.dtype)
    x = _patches(noisy).astype(task.dtype) @ w["enter"] + w["places"][None]
    for i in range(task.depth):
        p = _of_layer(w, i)
        shift, scale, shift2, scale2 = jnp.split((waves @ p["level"])[:, None], 4, axis=-1)
        x = x + _attention(task, p, _norm(x) * (1 + scale) + shift, causal=False)
        x = x + _mlp(p, _norm(x) * (1 + scale2) + shift2)
    found = (_norm(x) @ w["leave"]).astype(jnp.float32)
    return jnp.mean(jnp.square(found - _patches(noise))), jnp.float32(0)


def _convolution(task: Task, w: Weights, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Pictures to classes, by 3 × 3 convolutions on a 4 × 4 grid of patches."""
    grid = SIDE // PATCH
    x = _patches(batch["x"]).astype(task.dtype) @ w["enter"]
    x = x.reshape(-1, grid, grid, task.width)
    for i in range(task.depth):
        p = _of_layer(w, i)
        # A convolution as one matrix product of all nine neighbours: fast and of any precision.
        padded = jnp.pad(_norm(x, p["norm"]), ((0, 0), (1, 1), (1, 1), (0, 0)))
        near = [padded[:, r : r + grid, c : c + grid] for r in range(3) for c in range(3)]
        y = jax.nn.relu(jnp.concatenate(near, -1) @ p["kernel"].reshape(-1, task.width))
        x = x + y if task.block == "residual" else y
    logits = _norm(x, w["norm"]).mean((1, 2)) @ w["leave"]
    return _cross_entropy(logits, batch["y"]), jnp.float32(0)


def _classifier(task: Task, w: Weights, batch: Any) -> tuple[jax.Array, jax.Array]:
    """An MLP, residual with norms or plain with neither."""
    return _cross_entropy(_perceptron(task, w, batch["x"]), batch["y"]), jnp.float32(0)


def _regression(task: Task, w: Weights, batch: Any) -> tuple[jax.Array, jax.Array]:
    found = _perceptron(task, w, batch["x"])[:, 0].astype(jnp.float32)
    return jnp.mean(jnp.square(found - batch["y"])), jnp.float32(0)


def _perceptron(task: Task, w: Weights, x: jax.Array) -> jax.Array:
    x = jax.nn.gelu(x.astype(task.dtype) @ w["enter"] + w["enter bias"][None])
    for i in range(task.depth):
        p = _of_layer(w, i)
        if task.block == "residual":
            x = x + jax.nn.gelu(_norm(x) @ p["kernel"] + p["bias"][None])
        else:
            x = jax.nn.gelu(math.sqrt(2) * x @ p["kernel"] + p["bias"][None])
    return (x if task.block == "plain" else _norm(x)) @ w["leave"]


# Parts


def _mixer(task: Task, p: Weights, x: jax.Array) -> jax.Array:
    return _recurrence(task, p, x) if task.family == "recurrence" else _attention(task, p, x)


def _attention(task: Task, p: Weights, x: jax.Array, *, causal: bool = True) -> jax.Array:
    heads = max(1, task.width // HEAD)
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
    if task.block == "QK-norm":
        q, k = _norm(q), _norm(k)
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None, None], scores, -1e9)
    mixed = jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(scores).astype(x.dtype), v)
    return mixed.reshape(x.shape) @ p["out"]


def _recurrence(task: Task, p: Weights, x: jax.Array) -> jax.Array:
    """h_t = f_t h_{t-1} + (1 - f_t) v_t, a forget gate per channel. minGRU, arXiv 2410.01201."""
    forget, value, gate = (x @ p[name] for name in ("forget", "value", "gate"))
    keep = jax.nn.sigmoid(forget.astype(jnp.float32) + 2.0)
    new = (1 - keep) * value

    def join(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    def step(h: jax.Array, now: Any) -> Any:
        h = now[0] * h + now[1]
        return h, h

    if task.block == "associative":
        _, h = jax.lax.associative_scan(join, (keep, new), axis=1)
    else:
        ordered = jax.tree.map(lambda a: a.swapaxes(0, 1), (keep, new))
        h = jax.lax.scan(step, jnp.zeros_like(new[:, 0]), ordered)[1].swapaxes(0, 1)
    return (h.astype(x.dtype) * jax.nn.silu(gate)) @ p["out"]


def _mlp(p: Weights, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ p["up"]) @ p["down"]


def _experts(p: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best two of four MLPs, and the Switch load-balancing loss (arXiv 2101.03961, eq. 4).

    Every expert is computed and the others are weighed 0, which is exact and simple at this size.
    """
    share = jax.nn.softmax((x @ p["router"]).astype(jnp.float32))
    best, index = jax.lax.top_k(share, CHOSEN)
    chosen = jax.nn.one_hot(index, EXPERTS)
    weight = jnp.einsum("blk,blke->ble", best / best.sum(-1, keepdims=True), chosen)
    hidden = jax.nn.gelu(jnp.einsum("blw,ewh->bleh", x, p["up"]))
    y = jnp.einsum("bleh,ehw,ble->blw", hidden, p["down"], weight.astype(x.dtype))
    return y, EXPERTS * jnp.sum(chosen.mean((0, 1, 2)) * share.mean((0, 1)))


def _norm(x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
    """Root mean square norm, in float32."""
    exact = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(jnp.square(exact), -1, keepdims=True) + 1e-6)
    normed = (exact * size).astype(x.dtype)
    return normed if gain is None else normed * gain.reshape((1,) * (x.ndim - 1) + (-1,))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def _patches(pictures: jax.Array) -> jax.Array:
    grid = SIDE // PATCH
    cut = pictures.reshape(-1, grid, PATCH, grid, PATCH).swapaxes(2, 3)
    return cut.reshape(-1, grid * grid, PATCH * PATCH)


def _of_layer(w: Weights, i: int) -> Weights:
    start = f"{i}."
    return {name[len(start) :]: x for name, x in w.items() if name.startswith(start)}


_FAMILIES: dict[str, Callable[[Task, Weights, Any], tuple[jax.Array, jax.Array]]] = {
    "decoder": _decoder,
    "experts": _decoder,
    "recurrence": _decoder,
    "sequence": _sequence,
    "diffusion": _diffusion,
    "convolution": _convolution,
    "classifier": _classifier,
    "regression": _regression,
}


# Shapes: what comes before the layers, what each layer has, and what comes after them.

_Shapes = tuple[dict[str, Leaf], dict[str, Leaf], dict[str, Leaf]]


def _language(task: Task) -> _Shapes:
    width = task.width
    enter = {
        "embed": Leaf((task.vocabulary, width), "embedding"),
        "places": Leaf((task.length, width), "embedding"),
    }
    layer = _mixing(width, task.family) | _expanding(width)
    if task.family == "experts":
        layer |= {
            "router": Leaf((width, EXPERTS)),
            "up": Leaf((EXPERTS, width, 2 * width)),
            "down": Leaf((EXPERTS, 2 * width, width), "last"),
        }
    gains = {"norm1": Leaf((width,), "gain"), "norm2": Leaf((width,), "gain")}
    if task.block == "parallel":
        del gains["norm2"]
    return enter, layer | gains, {"norm": Leaf((width,), "gain")}


def _denoiser(task: Task) -> _Shapes:
    width = task.width
    enter = {
        "enter": Leaf((PATCH * PATCH, width)),
        "places": Leaf((task.length, width), "embedding"),
    }
    layer = _mixing(width, task.family) | _expanding(width)
    return enter, layer | {"level": Leaf((width, 4 * width), "last")}, {}


def _pictures(task: Task) -> _Shapes:
    width, gain = task.width, Leaf((task.width,), "gain")
    last = "last" if task.block == "residual" else "hidden"
    layer = {"kernel": Leaf((3, 3, width, width), last), "norm": gain}
    return {"enter": Leaf((PATCH * PATCH, width))}, layer, {"norm": gain}


def _vectors(task: Task) -> _Shapes:
    width = task.width
    bias = Leaf((width,), "bias")
    last = "last" if task.block == "residual" else "hidden"
    enter = {"enter": Leaf((INPUTS, width)), "enter bias": bias}
    return enter, {"kernel": Leaf((width, width), last), "bias": bias}, {}


def _mixing(width: int, family: str) -> dict[str, Leaf]:
    names = ("forget", "value", "gate") if family == "recurrence" else ("query", "key", "value")
    inner = {name: Leaf((width, width), heads=1) for name in names}
    return inner | {"out": Leaf((width, width), "last", heads=0)}


def _expanding(width: int) -> dict[str, Leaf]:
    return {"up": Leaf((width, 4 * width)), "down": Leaf((4 * width, width), "last")}


_PARTS: dict[str, Callable[[Task], _Shapes]] = {
    **dict.fromkeys(("decoder", "experts", "recurrence", "sequence"), _language),
    "diffusion": _denoiser,
    "convolution": _pictures,
    **dict.fromkeys(("classifier", "regression"), _vectors),
}

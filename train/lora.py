"""Low-rank adapters on the linear layers of a model. Source: LoRA, arXiv 2106.09685."""

import functools
import math
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Child = TypeVar("Child", bound=nnx.Module | nnx.Variable)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class WholeParam(nnx.LoRAParam):
    """A parameter of the base that an adapter replaces and trains (PEFT's `modules_to_save`)."""


def is_base(path: tuple[Any, ...], variable: Any) -> bool:
    """A filter of `nnx` for the parameters of the model itself, adapters left out."""
    return isinstance(variable, nnx.Param) and not str(path[-1]).startswith("lora_")


class LoRALinear(nnx.Module):
    """``y = base(x) + (drop(x) @ A) @ (scaling * B)``; A is random, B starts at zero.

    A has shape (inputs, rank) and is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), as in PEFT.
    Both are float32 whatever the base is, and used in the type of x. The scaling is alpha / rank,
    with `rslora` alpha / sqrt(rank). With `dora` the columns of ``kernel + scaling * A @ B`` are
    brought to lengths of their own, `lora_magnitude` (outputs,), float32, at first those of the
    kernel; the lengths before that are constants to the gradient, and the base's own product sees
    no dropout. Dropout is off until `deterministic` is False (`train.losses.Batch.step`). A base
    whose kernel has a leading axis of layers gets parameters and a dropout key with one, too, and
    is to be called a layer at a time.

    Raises `ValueError` for a rank below 1 and for a dropout outside [0, 1).

    Source: rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353.
    """

    def __init__(
        self,
        base: nnx.Linear,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        rngs: nnx.Rngs,
    ):
        _check(rank, dropout)
        *layers, inputs, outputs = base.kernel.shape
        draw = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(layers)))
        )
        self.base = base
        self.lora_A = nnx.LoRAParam(draw(rngs.params(), (*layers, inputs, rank)))
        self.lora_B = nnx.LoRAParam(jnp.zeros((*layers, rank, outputs)))
        if dora:
            self.lora_magnitude = nnx.LoRAParam(jnp.sqrt(_squares(base.kernel[...])))
        self.rank, self.alpha, self.rslora, self.dora = rank, alpha, rslora, dora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout, self.deterministic = nnx.Dropout(dropout), True
        if dropout:
            key = rngs.dropout()
            self.key = nnx.RngKey(
                jax.random.split(key, tuple(layers)) if layers else key, tag="dropout"
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        low = self.lora_A[...].astype(x.dtype)
        # B is small and what comes of it is not: scaled here, it saves a pass over every output.
        high = self.scaling * self.lora_B[...]
        out = self.base(x)
        if not self.dora:
            return out + (self._dropped(x) @ low) @ high.astype(x.dtype)
        stretch = self._stretch()
        straight = out if self.base.bias is None else out - _row(self.base.bias[...], out)
        out = out + _row(stretch - 1, out) * straight
        return out + (self._dropped(x) @ low) @ (stretch[None] * high).astype(x.dtype)

    def merged(self, layer: Any = ...) -> jax.Array:
        """The kernel (or that of a layer of a stack) with what the adapter makes of it."""
        kernel = self.base.kernel[layer]
        full = kernel + self.scaling * (self.lora_A[layer] @ self.lora_B[layer])
        if self.dora:
            full = full * self._stretch(layer)[..., None, :]
        return full.astype(kernel.dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.dropout.rate:
            return x
        return self.dropout(x, deterministic=False, rngs=self.key[...])

    def _stretch(self, layer: Any = ...) -> jax.Array:
        """By what each column of ``kernel + scaling * A @ B`` is multiplied, float32."""
        low, high = self.lora_A[layer], self.scaling * self.lora_B[layer]
        squares = jax.lax.stop_gradient(_squares(self.base.kernel[layer], low, high))
        nonzero = squares > 0
        lengths = jnp.sqrt(jnp.where(nonzero, squares, 1.0))
        return jnp.where(nonzero, self.lora_magnitude[layer] / lengths, 1.0)


def _row(values: jax.Array, like: jax.Array) -> jax.Array:
    """One value an output, in the type of `like` and to be combined with it."""
    return values.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


@jax.jit  # so that no float32 copy of a kernel is made on the way
def _squares(kernel: jax.Array, low: Any = None, high: Any = None) -> jax.Array:
    """Squared lengths of the columns of ``kernel + low @ high``, which is never formed whole."""
    kernel = kernel.astype(jnp.float32)
    own = jnp.sum(jnp.square(kernel), axis=-2)
    if low is None:
        return own
    product = functools.partial(jnp.matmul, precision="highest")
    turned = jnp.swapaxes(low, -1, -2)
    cross = 2 * product(turned, kernel) + product(product(turned, low), high)
    return own + jnp.sum(cross * high, axis=-2)


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    targets: Collection[str] = ATTENTION + MLP,
    rngs: nnx.Rngs,
) -> None:
    """Put a `LoRALinear` in place of every linear layer of `model` whose name is in `targets`.

    Train the adapters alone with ``model.split(model, nnx.LoRAParam)``: what is frozen has
    neither gradient nor optimizer state. Raises `ValueError` for a rank below 1, a dropout
    outside [0, 1), and a target that names no linear layer.

    >>> from train.model import PRESETS, Decoder, split
    >>> model = Decoder(PRESETS["tiny"], rngs=nnx.Rngs(0))
    >>> add_lora(model, rank=8, alpha=16, targets=["q_proj", "v_proj"], rngs=nnx.Rngs(1))
    >>> _, adapters, frozen = split(model, nnx.LoRAParam)
    >>> sum(leaf.size for leaf in jax.tree.leaves(adapters))
    10752
    """
    _check(rank, dropout)
    linears = list(_children(model, nnx.Linear))
    if unknown := set(targets) - {name for _, name, _ in linears}:
        known = ", ".join(sorted({name for _, name, _ in linears}))
        raise ValueError(f"targets={sorted(unknown)} name no linear layer; there are: {known}")
    kind: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "rslora": rslora,
        "dora": dora,
    }
    for parent, name, linear in linears:
        if name in targets:
            setattr(parent, name, LoRALinear(linear, **kind, rngs=rngs))


def _check(rank: int, dropout: float) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank}: a low-rank adapter needs a rank of at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: the share of inputs to drop lies in [0, 1)")


def merge_lora(model: nnx.Module) -> None:
    """Fold every adapter of `model` into its base (`LoRALinear.merged`)."""
    for parent, name, adapted in adapters(model):
        adapted.base.kernel[...] = adapted.merged()
        setattr(parent, name, adapted.base)
    for parent, name, whole in list(_children(model, WholeParam)):
        setattr(parent, name, nnx.Param(whole[...]))


def adapters(model: nnx.Module) -> list[tuple[nnx.Module, str, LoRALinear]]:
    """All (parent, attribute name, adapted layer) of the model."""
    return list(_children(model, LoRALinear))


def _children(model: nnx.Module, kind: type[Child]) -> Iterator[tuple[nnx.Module, str, Child]]:
    """All (parent, attribute name, child) of the model where the child is of this kind."""
    for _, parent in nnx.iter_modules(model):
        for name, child in vars(parent).items():
            if isinstance(child, kind):
                yield parent, name, child

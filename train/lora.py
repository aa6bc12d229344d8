"""Low-rank adapters on the linear layers of a model. Source: LoRA, arXiv 2106.09685."""

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Child = TypeVar("Child", bound=nnx.Module)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class LoRALinear(nnx.Module):
    """``y = base(x) + (drop(x) @ A) @ ((alpha / rank) * B)``; A is random, B starts at zero.

    A has shape (inputs, rank) and is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), as in PEFT.
    Both are float32 whatever the base is, and used in the type of x. Dropout is off until
    `deterministic` is False (`train.losses.Batch.step`). A base whose kernel has a leading axis
    of layers gets A, B and a dropout key with one, too, and is to be called a layer at a time.
    """

    def __init__(
        self, base: nnx.Linear, *, rank: int, alpha: float, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        *layers, inputs, outputs = base.kernel.shape
        draw = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(layers)))
        )
        self.base = base
        self.lora_A = nnx.LoRAParam(draw(rngs.params(), (*layers, inputs, rank)))
        self.lora_B = nnx.LoRAParam(jnp.zeros((*layers, rank, outputs)))
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / rank
        self.dropout, self.deterministic = nnx.Dropout(dropout), True
        if dropout:
            key = rngs.dropout()
            self.key = nnx.RngKey(
                jax.random.split(key, tuple(layers)) if layers else key, tag="dropout"
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        low = self.lora_A[...].astype(x.dtype)
        # B is small and what comes of it is not: scaled here, it saves a pass over every output.
        high = (self.scaling * self.lora_B[...]).astype(x.dtype)
        return self.base(x) + (self._dropped(x) @ low) @ high

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.dropout.rate:
            return x
        return self.dropout(x, deterministic=False, rngs=self.key[...])

    def change(self, layer: Any = ...) -> jax.Array:
        """What is added to the kernel (or to a layer of a stack): ``(alpha / rank) * A @ B``."""
        return self.scaling * (self.lora_A[layer] @ self.lora_B[layer])


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
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
    if rank < 1:
        raise ValueError(f"rank={rank}: a low-rank adapter needs a rank of at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: the share of inputs to drop lies in [0, 1)")
    linears = list(_children(model, nnx.Linear))
    if unknown := set(targets) - {name for _, name, _ in linears}:
        known = ", ".join(sorted({name for _, name, _ in linears}))
        raise ValueError(f"targets={sorted(unknown)} name no linear layer; there are: {known}")
    for parent, name, linear in linears:
        if name in targets:
            adapted = LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout, rngs=rngs)
            setattr(parent, name, adapted)


def merge_lora(model: nnx.Module) -> None:
    """Fold every adapter of `model` into its base: ``kernel += (alpha / rank) * A @ B``."""
    for parent, name, adapted in adapters(model):
        kernel = adapted.base.kernel
        kernel[...] = (kernel[...] + adapted.change()).astype(kernel.dtype)
        setattr(parent, name, adapted.base)


def adapters(model: nnx.Module) -> list[tuple[nnx.Module, str, LoRALinear]]:
    """All (parent, attribute name, adapted layer) of the model."""
    return list(_children(model, LoRALinear))


def _children(model: nnx.Module, kind: type[Child]) -> Iterator[tuple[nnx.Module, str, Child]]:
    """All (parent, attribute name, child) of the model where the child is of this kind."""
    for _, parent in nnx.iter_modules(model):
        for name, child in vars(parent).items():
            if isinstance(child, kind):
                yield parent, name, child

"""Low-rank adapters on the linear layers of a model. Source: LoRA, arXiv 2106.09685."""

from collections.abc import Collection, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Child = TypeVar("Child", bound=nnx.Module)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class LoRALinear(nnx.Module):
    """``y = base(x) + (alpha / rank) * (x @ A) @ B``; A is random, B starts at zero.

    A has shape (inputs, rank) and is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), as in PEFT.
    """

    def __init__(self, base: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs):
        inputs, outputs = base.kernel.shape
        draw = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.base = base
        self.lora_A = nnx.LoRAParam(draw(rngs.params(), (inputs, rank)))
        self.lora_B = nnx.LoRAParam(jnp.zeros((rank, outputs)))
        self.scaling = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.scaling * ((x @ self.lora_A[...]) @ self.lora_B[...])


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    targets: Collection[str] = ATTENTION + MLP,
    rngs: nnx.Rngs,
) -> None:
    """Put a `LoRALinear` in place of every linear layer of `model` whose name is in `targets`.

    Train the adapters alone with ``model.split(model, nnx.LoRAParam)``. Raises `ValueError`
    for a rank below 1 and for a target that names no linear layer.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: a low-rank adapter needs a rank of at least 1")
    linears = list(_children(model, nnx.Linear))
    if unknown := set(targets) - {name for _, name, _ in linears}:
        known = ", ".join(sorted({name for _, name, _ in linears}))
        raise ValueError(f"targets={sorted(unknown)} name no linear layer; there are: {known}")
    for parent, name, linear in linears:
        if name in targets:
            setattr(parent, name, LoRALinear(linear, rank=rank, alpha=alpha, rngs=rngs))


def merge_lora(model: nnx.Module) -> None:
    """Fold every adapter of `model` into its base: ``kernel += (alpha / rank) * A @ B``."""
    for parent, name, adapted in list(_children(model, LoRALinear)):
        change = adapted.lora_A[...] @ adapted.lora_B[...]
        adapted.base.kernel[...] += adapted.scaling * change
        setattr(parent, name, adapted.base)


def _children(model: nnx.Module, kind: type[Child]) -> Iterator[tuple[nnx.Module, str, Child]]:
    """All (parent, attribute name, child) of the model where the child is of this kind."""
    for _, parent in nnx.iter_modules(model):
        for name, child in vars(parent).items():
            if isinstance(child, kind):
                yield parent, name, child

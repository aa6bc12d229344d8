"""A mixture of experts in place of an MLP: the router, the products, the load-balance loss.

No token is dropped, whatever the router does. The rows of a batch are sorted by expert into blocks
that hold rows of one expert only, so that the work is that of the experts which are asked, and
every shape is known before the router is.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from train.architectures import Experts
from train.sharding import ROWS, has_mesh

Init = nnx.Initializer


class Routed(NamedTuple):
    """Sums over tokens that count: of one layer, or of several.

    Attributes:
      chosen: (experts,) how often each was chosen.
      probabilities: (experts,) what the router gave to each.
      tokens: scalar, how many there were.
    """

    chosen: jax.Array
    probabilities: jax.Array
    tokens: jax.Array


class Mixture(nnx.Module):
    """``sum_e weight_e * down_e(silu(gate_e(x)) * up_e(x))`` over a token's chosen experts e.

    The router's probabilities are a float32 softmax over all experts; the largest
    `num_experts_per_tok` are the weights, with `norm_topk_prob` divided by their sum.

    Args:
      hidden: width of the rows.
      config: number, width and choice of experts.
      dtype: of the products; None takes that of the parameters.
      param_dtype: of the parameters.
      init: of the matrices.
      rngs: for them.

    Source: Switch Transformers, arXiv 2101.03961; Mixtral of Experts, 2401.04088; Qwen3.
    """

    def __init__(
        self,
        hidden: int,
        config: Experts,
        *,
        dtype: Any,
        param_dtype: Any,
        init: Init,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        self.gate = Router(init(rngs.params(), (hidden, config.num_experts), param_dtype))
        width = config.moe_intermediate_size
        wide, narrow = (config.num_experts, hidden, width), (config.num_experts, width, hidden)
        self.experts = Stack(*(init(rngs.params(), s, param_dtype) for s in (wide, wide, narrow)))

    def __call__(self, x: jax.Array, counted: jax.Array | None = None) -> tuple[Any, Routed]:
        """Rows (n, hidden) to rows, and what the balance of the `counted` ones is made from."""
        dtype = self.dtype or self.gate.kernel.dtype
        x = x.astype(dtype)
        logits = jnp.dot(x, self.gate.kernel[...].astype(dtype))
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        stack = self.experts
        matrices = [m[...].astype(dtype) for m in (stack.gate_proj, stack.up_proj, stack.down_proj)]
        mixed = _mixed(x, chosen, weights.astype(dtype), *matrices)
        return mixed, _routed(chosen, probabilities, counted)


class Router(nnx.Module):
    """Its matrix; a module of its own for Hugging Face's name of it."""

    def __init__(self, kernel: jax.Array):
        self.kernel = nnx.Param(kernel)


class Stack(nnx.Module):
    """The matrices of all experts, (experts, inputs, outputs)."""

    def __init__(self, gate: jax.Array, up: jax.Array, down: jax.Array):
        self.gate_proj, self.up_proj, self.down_proj = map(nnx.Param, (gate, up, down))


def balance_loss(routed: Routed) -> jax.Array:
    """``experts * sum_e (share of tokens sent to e) * (mean probability of e)``, 1 at the best.

    Times the number of experts a token is sent to, as `transformers` has it. Shares and means
    are those over all layers and tokens that count together. Source: Switch Transformers,
    arXiv 2101.03961, equations 4 to 6; `load_balancing_loss_func` of `transformers`.

    >>> even = Routed(chosen=jnp.full(4, 2.0), probabilities=jnp.full(4, 1.0), tokens=4.0)
    >>> float(balance_loss(even))  # two experts a token
    2.0
    """
    tokens = jnp.maximum(routed.tokens, 1)
    products = (routed.chosen / tokens) * (routed.probabilities / tokens)
    return len(routed.chosen) * products.sum()


def _routed(chosen: jax.Array, probabilities: jax.Array, counted: jax.Array | None) -> Routed:
    count = jnp.ones(len(chosen)) if counted is None else counted.astype(jnp.float32)
    of_each = chosen[:, :, None] == jnp.arange(probabilities.shape[-1])[None, None]
    return Routed(
        jnp.sum(of_each * count[:, None, None], axis=(0, 1)),
        jnp.sum(probabilities * count[:, None], axis=0),
        count.sum(),
    )


# --- the products ------------------------------------------------------------------------------


def _mixed(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, gate: Any, up: Any, down: Any
) -> jax.Array:
    """On a mesh each device does what its own experts are asked for, and the parts are summed."""
    if not has_mesh():
        return _local(x, chosen, weights, gate, up, down, first=0)
    rows, wide, narrow = P(ROWS, None), P("expert", None, "tensor"), P("expert", "tensor", None)
    return jax.shard_map(
        _of_one_device,
        in_specs=(rows, rows, rows, wide, wide, narrow),
        out_specs=rows,
        check_vma=False,
    )(x, chosen, weights, gate, up, down)


def _of_one_device(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, gate: Any, up: Any, down: Any
) -> jax.Array:
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
    first = jax.lax.axis_index("expert") * gate.shape[0]
    part = _local(gather(x), gather(chosen), gather(weights), gate, up, down, first=first)
    part = jax.lax.psum(part, "tensor")
    return jax.lax.psum_scatter(part, "expert", scatter_dimension=0, tiled=True)


def _local(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, gate: Any, up: Any, down: Any, first: Any
) -> jax.Array:
    """What the experts from `first` on, those of the matrices, make of the rows sent to them."""
    plan = _planned((chosen - first).reshape(-1), experts=gate.shape[0])
    sent = jnp.take(x, plan.row // chosen.shape[1], axis=0, mode="fill", fill_value=0)
    blocks = sent.reshape(len(plan.expert), -1, x.shape[1])
    inner = jax.nn.silu(_product(blocks, gate, plan.expert)) * _product(blocks, up, plan.expert)
    made = _product(inner, down, plan.expert).reshape(-1, x.shape[1])
    factor = jnp.take(weights.reshape(-1), plan.row, mode="fill", fill_value=0)
    return (
        jnp.zeros_like(x).at[plan.row // chosen.shape[1]].add(made * factor[:, None], mode="drop")
    )


class _Plan(NamedTuple):
    """Blocks in order of their experts.

    Attributes:
      expert: (blocks,) whose rows a block holds; the number of experts: it is empty.
      row: (blocks * size,) which (token, choice) pair lies there; far outside: none.
    """

    expert: jax.Array
    row: jax.Array


def _planned(expert: jax.Array, experts: int) -> _Plan:
    """Where each (token, choice) pair goes, given its expert; those of other devices nowhere.

    Every expert has whole blocks, of as many rows as an expert has on average: at most twice as
    many rows are multiplied as are sent.
    """
    pairs = len(expert)
    size = -(-pairs // experts)
    blocks = -(-pairs // size) + experts
    expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=experts + 1)[:experts]
    filled = -(-counts // size)  # blocks of each
    ends = jnp.cumsum(filled)
    of_block = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    owner = jnp.minimum(of_block, experts - 1)
    inside = jnp.arange(blocks) - (ends - filled)[owner]  # which of its expert's blocks
    offset = inside[:, None] * size + jnp.arange(size)[None]
    is_row = (of_block < experts)[:, None] & (offset < counts[owner][:, None])
    sorted_at = (jnp.cumsum(counts) - counts)[owner][:, None] + offset
    row = jnp.where(is_row, order[jnp.where(is_row, sorted_at, 0)], _NOWHERE)
    return _Plan(of_block, row.reshape(-1))


_NOWHERE = 2**30
"""Beyond any row, also when it is divided by the number of choices."""


@jax.custom_vjp
def _product(blocks: jax.Array, matrices: jax.Array, expert: jax.Array) -> jax.Array:
    """(blocks, size, inputs) times the matrix of each block's expert; empty ones are skipped.

    With a gradient of its own: that of a loop adds to all matrices for every block.
    """
    shape = (*blocks.shape[:2], matrices.shape[2])

    def one(_: None, part: Any) -> tuple[None, jax.Array]:
        block, at = part
        empty = jnp.zeros(shape[1:], blocks.dtype)
        return None, jax.lax.cond(
            at < len(matrices), lambda: jnp.dot(block, matrices[at]), lambda: empty
        )

    return jax.lax.scan(one, None, (blocks, expert))[1]


def _forward(blocks: jax.Array, matrices: jax.Array, expert: jax.Array) -> tuple[Any, Any]:
    return _product(blocks, matrices, expert), (blocks, matrices, expert)


def _backward(kept: Any, tangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    blocks, matrices, expert = kept
    inputs = _product(tangent, matrices.swapaxes(1, 2), expert)

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        block, change, at = part
        own = jnp.dot(block.T, change, preferred_element_type=jnp.float32)
        return total.at[at].add(own, mode="drop"), None

    zeros = jnp.zeros(matrices.shape, jnp.float32)
    total, _ = jax.lax.scan(add, zeros, (blocks, tangent, expert))
    return inputs, total.astype(matrices.dtype), None


_product.defvjp(_forward, _backward)

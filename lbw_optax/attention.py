"""QK-clip: where attention logits grow beyond a threshold, queries and keys are scaled down.

An action on weights, after the optimizer's step, by what the model has measured of itself. It is no
part of the guard, whose decisions are the same with it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lbw_optax import groups
from lbw_optax.activations import Activations, largest_logits, natural
from lbw_optax.groups import STACKED, Grouping, Place
from lbw_optax.law.telemetry import wide_type
from lbw_optax.types import PyTree

THRESHOLD = 100.0
PROJECTIONS = ("q_proj", "k_proj", "query", "key")
NORMS = ("q_norm", "k_norm", "query_norm", "key_norm", "query_ln", "key_ln")


class QKClipState(NamedTuple):
    """What `qk_clip` remembers.

    Attributes:
      qk_clips: int32, how often the weights of a layer, or of heads that share a key, were scaled.
    """

    qk_clips: jax.Array


def by_attention(path: str, *, stacked: str | None = None) -> str | None:
    """The attention whose queries or keys a leaf projects, for ``qk_clip(layers=by_attention)``.

    The path up to a part q_proj, k_proj, query or key; None of any other leaf.

    Args:
      path: of the leaf, its keys with "/" between them.
      stacked: the name of the part under which the layers are stacked for a scan, one slice of each
        leaf's first axis a layer: ``functools.partial(by_attention, stacked="layers")``.

    Raises:
      ValueError: for adapters (LoRA), of which only one factor could be scaled and not the frozen
        weights beside them, and for norms of queries and keys, which undo any scale.

    Example:
      >>> from lbw_optax import by_attention
      >>> by_attention("layers/3/attn/q_proj/kernel"), by_attention("layers/3/attn/v_proj/kernel")
      ('layers/3/attn', None)
      >>> by_attention("layers/attn/k_proj/bias", stacked="layers")
      'layers/attn[*]'
    """
    groups.require_path(path, "layers", "by_attention")
    parts = path.split("/")
    norms = [part for part in parts if part in NORMS]
    if norms:
        raise ValueError(
            f"QK-clip is for attention without norms of its queries and keys, and {path!r} is one: "
            "a norm undoes any scale of them, and bounds the logits itself."
        )
    begin = next((i for i, part in enumerate(parts) if part in PROJECTIONS), None)
    if begin is None:
        return None
    if any("lora" in part.lower() for part in parts[begin:]):
        raise ValueError(
            f"QK-clip scales whole projections of queries and keys, and {path!r} is an adapter of "
            "one: merge the adapters, or train the projections themselves."
        )
    return "/".join(parts[:begin]) + (STACKED if stacked in parts[:begin] else "")


def qk_clip(
    threshold: float = THRESHOLD, *, layers: Grouping = by_attention
) -> optax.GradientTransformationExtraArgs:
    r"""Hold attention logits at a threshold, by scaling the projections of queries and keys.

    Chained after an optimizer, guarded or not. Where the largest logit S of a layer, or of a head,
    exceeds the threshold :math:`\tau`, the parameters p of its queries and keys, weights and
    biases, become

    .. math::
      \sqrt{\tau / S}\; (p + u), \qquad
      u \leftarrow u + \big(\sqrt{\tau / S} - 1\big)\,(p + u)

    with u the updates. A logit is a product of a query and a key, so the same inputs have the
    largest logit :math:`\tau` after a step with u = 0. S is measured before the step, so a step
    may go beyond :math:`\tau` by what it adds itself. Where S is not larger, or not finite, the
    updates stay as they are to the bit. The optimizer's state is not scaled.

    S comes with ``update(..., activations=...)``, as the guard takes it (see the page
    *Activations*): for each attention the largest logit, a number; of a stack of layers an array
    of [layers], or of [layers, heads] as of ``attention_logit_max(..., per_head=True)``. The k-th
    of them, in the order in which activations are counted, is that of the k-th attention in the
    order of its name. A step without ``activations`` is left as it is.

    Heads that share a key are one here: all of them and their key are scaled by the largest of
    their logits. Their number is read off the shapes: heads are the outermost part of the outputs,
    and a key serves heads that stand together, as in :func:`jax.nn.dot_product_attention`.

    It acts on every step that it is given logits of, those that a guard before it skips and layers
    that it freezes among them. A norm of queries and keys makes it pointless, and adapters (LoRA)
    are not supported: :func:`by_attention` refuses both. Neither are queries, keys and values in
    one array, and latent attention (MLA), in which heads share a part of their keys.

    Args:
      threshold: the largest logit, above 0.
      layers: from the path of a leaf, its keys with "/" between them, to the name of the attention
        whose queries or keys it projects, or None; as `groups` of :func:`lbw_guard`. Of a name
        that ends in "[*]" each slice along the leaves' first axis is a layer.

    Returns:
      A transformation whose state has one number, ``optax.tree.get(state, "qk_clips")``: how often
      a layer, or heads that share a key, were scaled.

    Raises:
      ValueError: for a threshold that is not above 0; from ``init`` if no leaf is of an attention;
        from ``update`` without parameters, and for logits of another number of layers or heads.

    Example:
      >>> import jax.numpy as jnp, lbw_optax, optax
      >>> tx = optax.chain(lbw_optax.adamw(1e-3), lbw_optax.qk_clip(100.0))
      >>> params = {"attn": {"q_proj": jnp.full((4, 4), 3.0), "k_proj": jnp.full((4, 4), 3.0)}}
      >>> state, zeros = tx.init(params), optax.tree.zeros_like(params)
      >>> updates, state = tx.update(zeros, state, params, activations={"attn": jnp.float32(900)})
      >>> print(optax.apply_updates(params, updates)["attn"]["q_proj"][0, 0])
      1.0
      >>> print(optax.tree.get(state, "qk_clips"))
      1

    References:
      Kimi K2, 2025 (arXiv:2507.20534), which was trained with it.
    """
    _validate(threshold, layers)

    def init_fn(params: PyTree) -> QKClipState:
        if not groups.find(layers, params).names:
            raise ValueError(
                "qk_clip finds no projection of queries or keys among the parameters: pass a "
                "function layers= that knows them by their paths."
            )
        return QKClipState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: PyTree,
        state: QKClipState,
        params: PyTree = None,
        *,
        activations: Activations | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, QKClipState]:
        del extra_args
        if params is None:
            raise ValueError(
                "qk_clip scales parameters: pass them, tx.update(grads, state, params)."
            )
        if activations is None:
            return updates, state
        leaves = list(_leaves(layers, updates, params))
        largest = _in_order_of(groups.find(layers, params).names, largest_logits(activations))
        factors = _factors(leaves, largest, threshold)
        clips = jnp.sum(jnp.concatenate([x.reshape(-1) for x in factors.values()]) < 1)
        scaled = [
            leaf.update if leaf.place is None else _scaled(leaf, factors[leaf.place])
            for leaf in leaves
        ]
        room = jnp.iinfo(jnp.int32).max - state.qk_clips
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), QKClipState(
            state.qk_clips + jnp.minimum(clips.astype(jnp.int32), room)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Leaf(NamedTuple):
    """A leaf of the updates, and its parameter; `place` is None where it is no projection."""

    update: Any
    param: Any
    place: Place | None
    is_bias: bool

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes of its outputs: all heads in one, or heads and what each of them has."""
        return self.param.shape[bool(self.place and self.place.slices) + (not self.is_bias) :]


def _leaves(layers: Grouping, updates: PyTree, params: PyTree) -> Iterator[Leaf]:
    places = groups.find(layers, params).places
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    each = jax.tree.leaves(updates)
    if len(each) != len(places):
        raise ValueError(
            f"The updates have {len(each)} leaves and the parameters {len(places)}: qk_clip needs "
            "one for one."
        )
    for u, p, place, path in zip(each, jax.tree.leaves(params), places, paths, strict=True):
        ends = jax.tree_util.keystr(path[-2:], simple=True, separator="/").split("/")
        yield Leaf(u, p, place, "bias" in ends)


def _in_order_of(names: list[str], largest: jax.Array) -> jax.Array:
    """The logits, which come in the order of the layers' names, in that of the parameters."""
    if len(largest) != len(names):
        raise ValueError(
            f"qk_clip needs the largest attention logit of each attention, of {len(names)} "
            f"({names[0]} and so on), and activations hold {len(largest)}."
        )
    order = sorted(range(len(names)), key=lambda i: natural(names[i]))
    return groups.replicated(largest)[np.argsort(order)]


def _factors(
    leaves: list[Leaf], largest: jax.Array, threshold: ArrayLike
) -> dict[Place, jax.Array]:
    """Of each layer, or stack of them, the factor of each key: float32[layers, keys]."""
    sizes: dict[Place, list[int]] = {}
    for leaf in leaves:
        if leaf.place is not None:
            sizes.setdefault(leaf.place, []).append(math.prod(leaf.outputs))
    factors = {}
    for place, outputs in sizes.items():
        rows = largest[place.group : place.group + max(place.slices, 1)]
        heads = rows.shape[1]
        keys = heads * min(outputs) / max(outputs) if heads > 1 else 1
        if keys % 1 or heads % keys or min(outputs) % keys:
            raise ValueError(
                f"Queries and keys with {max(outputs)} and {min(outputs)} outputs are not those of "
                f"{heads} heads, of which activations hold the largest logits."
            )
        shared = jnp.max(rows.reshape(len(rows), int(keys), -1), axis=-1)
        over = (shared > threshold) & (shared < jnp.inf)
        # Roots first, for the quotient of a small and a huge number is none.
        root = jnp.sqrt(jnp.asarray(threshold, jnp.float32)) / jnp.sqrt(shared)
        factors[place] = jnp.where(over, root, 1.0)
    return factors


def _scaled(leaf: Leaf, factors: jax.Array) -> Any:
    """The update that makes the parameter after the step one times its factor."""
    u, p = jnp.asarray(leaf.update), jnp.asarray(leaf.param)
    layers, keys = factors.shape
    shape = [1] * u.ndim
    if leaf.place and leaf.place.slices:
        shape[0] = layers
    if keys > 1:
        outermost = leaf.outputs[0]
        factors = jnp.repeat(factors, outermost // keys, axis=-1)
        shape[u.ndim - len(leaf.outputs)] = outermost
    factor = groups.broadcast(factors.reshape(shape), u)
    wide = jnp.promote_types(wide_type(u.dtype), wide_type(p.dtype))
    after = p.astype(wide) + u.astype(wide)
    moved = (u.astype(wide) + (factor - 1).astype(wide) * after).astype(u.dtype)
    return jnp.where(factor == 1, u, moved)


def _validate(threshold: Any, layers: Callable[..., Any]) -> None:
    if not _is_positive(threshold):
        raise ValueError(f"threshold must be a number above 0, got {threshold!r}.")
    if not callable(layers):
        raise ValueError(
            "layers must be a function from the path of a leaf to the name of its attention, as "
            f"lbw_optax.by_attention is, got {layers!r}."
        )


def _is_positive(x: Any) -> bool:
    """A finite number above 0; a traced one is not looked at."""
    if isinstance(x, jax.core.Tracer):
        return True
    is_number = np.ndim(x) == 0 and np.issubdtype(np.asarray(x).dtype, np.number)
    return is_number and bool(0 < x < np.inf)

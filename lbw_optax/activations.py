"""What goes on inside a model: outliers of its activations, attention logits, ranks of its weights.

Plain functions of arrays, to be called anywhere in a model. What they give is passed to the guard
as ``update(..., activations={"layers.0": activation_outliers(x), ...})``, which remembers it and
decides nothing by it. See the page *Activations*.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lbw_optax.groups import replicated
from lbw_optax.law.telemetry import matrix_of, wide_type

# So many queries of each sequence have their logits computed.
QUERIES = 16
# Enough that the stable rank of a matrix without structure is about a tenth too large.
ITERATIONS = 20


class Outliers(NamedTuple):
    """How far the largest elements of an array stand out; scalars, or one for each layer.

    Attributes:
      share: float32, share of the elements with abs(x) > k RMS(x).
      peak: float32, max abs(x) / RMS(x); 1 where all are as large, sqrt(n) where one is alone.
    """

    share: jax.Array
    peak: jax.Array


class Stacked(NamedTuple):
    """Activations of all layers as arrays.

    Attributes:
      outliers: of each layer, float32[layers].
      logits: the largest attention logits, float32[layers with one].
    """

    outliers: Outliers
    logits: jax.Array


Activations = Mapping[str, Outliers | ArrayLike]
"""From the name of a layer to its `Outliers`, or to its largest attention logit, a number.

Either may be of a stack of layers, with one axis, and logits of each head of such a stack, with a
second. Layers are counted in the order of their names, in which numbers count as such:
``layers.2`` comes before ``layers.10``.
"""


def activation_outliers(x: ArrayLike, k: float = 6.0) -> Outliers:
    r"""How far the largest elements of an array stand out.

    .. math::
      \mathrm{RMS}(x) = \sqrt{\textstyle \frac1n \sum_i |x_i|^2}, \qquad
      \mathrm{share} = \frac1n\,\#\{i : |x_i| > k\,\mathrm{RMS}(x)\}, \qquad
      \mathrm{peak} = \max_i |x_i| / \mathrm{RMS}(x)

    Of normal numbers the share beyond 6 is 2e-9, and the peak of a million of them is about 5. Both
    are free of the unit of x. Three reductions that read x; no copy of it is made, whatever its
    dtype. For a part of a large array pass a part: ``x[::stride]``.

    Args:
      x: of any shape and of any dtype of numbers. Squares neither overflow nor vanish: they are
        those of x over its largest element, in float32 (of float64 in float64).
      k: how many RMS are far, above 0.

    Returns:
      Two float32 scalars; 0 and 0 of zeros. Both are NaN if an element is NaN or infinite.

    Raises:
      ValueError: if x has no elements, or k is not above 0.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> x = jnp.ones(100).at[7].set(-30.0)
      >>> found = lbw_optax.activation_outliers(x)
      >>> print(f"{found.share:.2f} {found.peak:.2f}")
      0.01 9.49

    References:
      Outliers beyond six are those of Dettmers et al., 2022 (arXiv:2208.07339), there in units of
      the activations; one channel that dwarfs the others is in Sun et al., 2024 (arXiv:2402.17762).
    """
    x = jnp.asarray(x)
    if not x.size:
        raise ValueError(f"activation_outliers needs at least one element, got shape {x.shape}.")
    if isinstance(k, int | float | np.number) and not k > 0:
        raise ValueError(f"k must be a number above 0, got {k!r}.")
    size = jnp.abs(x.astype(jnp.promote_types(wide_type(x.dtype), jnp.float32)))
    largest = jnp.max(size)
    finite = jnp.isfinite(largest)
    # Compilers multiply by an inverse, which is no normal number where the largest is huge.
    factor = jnp.where(largest > 1, 2.0**-32, 2.0**32).astype(size.dtype)
    size = size * factor / jnp.where(finite & (largest > 0), largest * factor, 1.0)
    rms = jnp.sqrt(_mean(jnp.square(size)))
    share = _mean((size > k * rms).astype(size.dtype))
    peak = jnp.where(largest > 0, 1 / jnp.where(rms > 0, rms, 1.0), 0.0)
    found = Outliers(share, peak)
    return jax.tree.map(lambda y: jnp.where(finite, y, jnp.nan).astype(jnp.float32), found)


def attention_logit_max(
    query: ArrayLike,
    key: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    queries: int = QUERIES,
    per_head: bool = False,
) -> jax.Array:
    r"""The largest attention logit of evenly spaced queries with all of their keys.

    .. math::
      \max_{b,\ t \in S,\ s \text{ seen by } t,\ h} \mathrm{scale}\; q_{bth} \cdot k_{bsh}

    For whoever calls an attention that keeps its logits to itself, as
    :func:`jax.nn.dot_product_attention`, whose arguments these are. S are at most `queries`
    positions, the last one among them: the result is exact up to that length, and above it never
    more than the largest of all. It costs queries / length of what all logits cost, and no array is
    made of them that is larger.

    Args:
      query: (batch, length, heads, size), or without batch.
      key: (batch, keys, kv_heads, size); heads are a multiple of kv_heads.
      mask: bool, to be broadcast to (batch, heads, length, keys); what is False is not seen.
      scale: of the products; 1 / sqrt(size) by default.
      is_causal: query t sees the keys up to t.
      queries: how many of each sequence are looked at, at least 1.
      per_head: give the largest of each head, float32[heads], and not the one of all.

    Returns:
      A float32 scalar, of products that are summed in float32. NaN if a logit that is seen is; -inf
      if none is seen. What an attention does to its logits afterwards (a soft cap) is not in it.

    Raises:
      ValueError: for shapes that do not go together, a mask that is not bool (one that is added
        to the logits is False where all is seen), and for less than one query.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> q, k = jnp.full((2, 8, 4, 16), 3.0), jnp.ones((2, 8, 2, 16))
      >>> print(lbw_optax.attention_logit_max(q, k, is_causal=True))
      12.0

    References:
      A largest logit that grows without bound comes before divergence: Dehghani et al., 2023
      (arXiv:2302.05442); Kimi K2 holds it at 100 (arXiv:2507.20534).
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries!r}.")
    _require_attention(query, key)
    if mask is not None and jnp.result_type(mask) != jnp.bool_:
        raise ValueError(
            f"mask must be bool, True where a key is seen, got {jnp.result_type(mask)}: of a mask "
            "that is added to the logits pass mask == 0."
        )
    *_, length, heads, size = query.shape
    stride = -(-length // queries)
    first = (length - 1) % stride
    taken = query[..., first::stride, :, :]
    grouped = taken.reshape(*taken.shape[:-2], key.shape[-2], -1, size)
    product = "...tkgd,...skd->...kgts"
    logits = jnp.einsum(product, grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(*logits.shape[:-4], heads, *logits.shape[-2:])
    logits = logits.astype(jnp.float32) * (size**-0.5 if scale is None else scale)
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = mask.reshape((1,) * (logits.ndim - mask.ndim) + mask.shape)
        seen = mask if mask.shape[-2] == 1 else mask[..., first::stride, :]
        logits = jnp.where(seen, logits, -jnp.inf)
    if is_causal:
        at = first + stride * jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 2)
        of = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(of <= at, logits, -jnp.inf)
    return jnp.max(logits, axis=(*range(logits.ndim - 3), -2, -1) if per_head else None)


def stable_rank(w: ArrayLike, iterations: int = ITERATIONS) -> jax.Array:
    r"""The stable rank of a leaf, as the matrix that the law measures it by.

    .. math::
      |W|_F^2 / \sigma_1(W)^2

    W has the rows and columns of the most balanced matrix that the leaf's axes, in their order,
    make; the law counts a leaf's update by the smaller of the two, at which this rank would end. A
    vector has rank 1. The largest singular value comes from `iterations` steps of the power method
    from a fixed start, and the true one is no smaller: the stable rank is a bound from above. On
    matrices of normal numbers it is 5 to 15 % too large, and nearly exact where one direction
    stands out, for which one looks. A stack of layers is one leaf: take ``jax.vmap(stable_rank)``.

    Args:
      w: of any shape and dtype; float32 at least is what is computed in.
      iterations: steps, of two products with W each, at least 1.

    Returns:
      A float32 scalar: 0 of zeros, and NaN if an element is not finite.

    Raises:
      ValueError: if w has no elements or no axis, or for less than one iteration.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> print(f"{lbw_optax.stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))):.2f}")
      1.50

    References:
      Kuczyński and Woźniakowski, 1992: the power method's mean relative error of the largest
      eigenvalue, here of W'W, is at most 0.87 log(n) / (iterations - 1), whatever the matrix.
    """
    w = jnp.asarray(w)
    if not w.size or not w.ndim:
        raise ValueError(f"stable_rank needs an array with elements, got shape {w.shape}.")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r}.")
    w = replicated(w)  # a product of two parts of it would be none
    w = w.reshape(matrix_of(w.shape)).astype(jnp.promote_types(wide_type(w.dtype), jnp.float32))
    largest = jnp.max(jnp.abs(w))
    sound = jnp.isfinite(largest) & (largest > 0)
    w = w / jnp.where(sound, largest, 1.0)

    def turn(_: int, v: jax.Array) -> jax.Array:
        turned = w.conj().T @ (w @ v)
        length = jnp.linalg.norm(turned)
        return turned / jnp.where(length > 0, length, 1.0)

    start = jax.random.normal(jax.random.key(0), (w.shape[1],), jnp.float32).astype(w.dtype)
    v = jax.lax.fori_loop(0, iterations, turn, start / jnp.linalg.norm(start))
    squares, top = jnp.sum(jnp.square(jnp.abs(w))), jnp.sum(jnp.square(jnp.abs(w @ v)))
    rank = jnp.where(sound, squares / jnp.where(sound, top, 1.0), 0.0)
    return jnp.where(jnp.isfinite(largest), rank, jnp.nan).astype(jnp.float32)


def stacked(activations: Activations) -> Stacked:
    """What `update` is given, as arrays over layers in the order of their names.

    Raises:
      ValueError: if it is no mapping from names to `Outliers` and numbers, one for each layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from lbw_optax.activations import Outliers, stacked
      >>> stack = Outliers(jnp.zeros(2), jnp.array([4.0, 9.0]))
      >>> stacked({"layers": stack, "attention": jnp.array([3.0, 5.0])}).outliers.peak.tolist()
      [4.0, 9.0]
    """
    named = _in_order(activations)
    outliers = [x for x in named.values() if _is_outliers(x)]
    logits = [x for x in named.values() if not _is_outliers(x)]
    shares, peaks = [x[0] for x in outliers], [x[1] for x in outliers]
    logits = [jnp.max(x, axis=-1) if jnp.ndim(x) == 2 else x for x in logits]
    return Stacked(Outliers(_joined(shares), _joined(peaks)), _joined(logits))


def largest_logits(activations: Activations) -> jax.Array:
    """The largest attention logits, float32[layers, heads], of layers in the order of their names.

    One for a whole layer stands as that of one head.

    Raises:
      ValueError: as `stacked`, or if layers differ in their number of heads.

    Example:
      >>> import jax.numpy as jnp
      >>> from lbw_optax.activations import largest_logits
      >>> largest_logits({"b.10": 3.0, "b.2": 5.0, "c": jnp.array([7.0, 1.0])}).tolist()
      [[5.0], [3.0], [7.0], [1.0]]
    """
    every = [jnp.asarray(x) for x in _in_order(activations).values() if not _is_outliers(x)]
    rows = [x.reshape(-1, x.shape[1] if x.ndim == 2 else 1).astype(jnp.float32) for x in every]
    if len({row.shape[1] for row in rows}) > 1:
        raise ValueError(
            "The largest attention logits must be of as many heads in every layer, got "
            f"{', '.join(str(row.shape[1]) for row in rows)}."
        )
    return jnp.concatenate(rows) if rows else jnp.zeros([0, 1], jnp.float32)


def layer_names(activations: Activations) -> list[str]:
    """The names of the layers that have `Outliers`, by the number that the metrics give.

    Of a stack they are ``NAME/0``, ``NAME/1`` and so on.

    >>> from lbw_optax.activations import Outliers, layer_names
    >>> layer_names({"b.10": Outliers(0.0, 1.0), "b.2": Outliers(0.0, 1.0)})
    ['b.2', 'b.10']
    """
    names = []
    for name, x in _in_order(activations).items():
        if _is_outliers(x):
            peak = jnp.asarray(x[1])
            names += [f"{name}/{i}" for i in range(len(peak))] if peak.ndim else [name]
    return names


def _in_order(activations: Activations) -> dict[str, Any]:
    if not isinstance(activations, Mapping):
        raise ValueError(
            "activations must be a mapping from the name of a layer to what activation_outliers "
            f"gives or to its largest attention logit, got {type(activations).__name__}."
        )
    for name, x in activations.items():
        _require_numbers(name, x)
    return dict(sorted(activations.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, int, str]]:
    """What names are sorted by, so that numbers in them count as such."""
    parts = re.split(r"(\d+)", str(name))
    return [(0, int(x), "") if x.isdecimal() else (1, 0, x) for x in parts]


def _is_outliers(x: Any) -> bool:
    """Also where a checkpoint, or a framework, has made a plain tuple of it."""
    return isinstance(x, tuple) and len(x) == 2


def _require_numbers(name: str, x: Any) -> None:
    parts = list(x) if _is_outliers(x) else [x]
    numbers = all(map(_is_real, parts))
    shapes = {jnp.shape(part) for part in parts} if numbers else {()}
    axes = 1 if _is_outliers(x) else 2
    if not numbers or len(shapes) != 1 or len(shape := shapes.pop()) > axes or 0 in shape:
        of = f"shapes {', '.join(map(str, map(jnp.shape, parts)))}" if numbers else f"{x!r}"
        raise ValueError(
            f"activations[{name!r}] must be what activation_outliers gives, or a number, or one of "
            f"these for each layer of a stack, or numbers for its layers and heads, got {of}."
        )


def _is_real(x: Any) -> bool:
    """Whether it is numbers that float32 can stand for: no text, key, time or complex number."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic | float | int):
        return False
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _joined(parts: list[Any]) -> jax.Array:
    arrays = [jnp.asarray(x, jnp.float32).reshape(-1) for x in parts]
    return jnp.concatenate(arrays) if arrays else jnp.zeros([0], jnp.float32)


def _mean(x: jax.Array) -> jax.Array:
    """In two steps: float32 cannot count the elements of a large array one by one."""
    return jnp.mean(jnp.mean(x, axis=-1)) if x.ndim else x


def _require_attention(query: jax.Array, key: jax.Array) -> None:
    same = query.ndim == key.ndim and query.ndim in (3, 4) and query.shape[-1] == key.shape[-1]
    if not (same and query.shape[:-3] == key.shape[:-3]) or not (query.size and key.size):
        raise ValueError(
            "query and key must be (batch, length, heads, size), alike in batch and size, got "
            f"shapes {query.shape} and {key.shape}."
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{query.shape[-2]} query heads are no multiple of {key.shape[-2]} key heads."
        )

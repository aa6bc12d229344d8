"""What one training step shows: every signal that the guard watches, and nothing else.

`observe_gradients` measures what arrives, `observe_step` what is about to be applied. Both read
whole pytrees and return float32 scalars; no decision is taken here.
"""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lbw_optax import parts
from lbw_optax.types import Loss, PyTree

# At most this many leaves are probed, drawn by size: a compiler chokes on operations for each leaf.
PROBE_LEAVES = 64
# A leaf contributes this share of its coordinates to the probe, within these bounds.
PROBE_SHARE, PROBE_LEAST, PROBE_MOST = 128, 1024, 16384
# And about so many positions of an axis at least: fewer would miss whole rows of it.
PROBE_POSITIONS = 8
# The mean of the parameters is over this share of the run, and over so many steps at least.
HORIZON, LEAST_HORIZON = 1 / 2, 4
# The side of a matrix at which an update counts as it is, and the least that counts: an adapter's
# rank says little of the stable rank of its update.
SIDE, LEAST_SIDE = 96.0, 27
# Corruption of memory, no step of an optimizer: updates this many times as long as the last and
# longer than the parameters; parameters this many times as long as those before and so many of the
# last updates could make them.
UPDATE_JUMP, PARAMETER_JUMP, REACH = 1000.0, 2.0, 2.0

# Bucket i of the histogram counts 2^(2i-24) <= |g| < 2^(2i-22); the first and last take the rest.
HISTOGRAM_EDGES = tuple(range(-24, 8, 2))


class Telemetry(NamedTuple):
    """The signals of the newest step: scalars, float32 unless said otherwise.

    A signal that could not be measured keeps its last value and its `has_...` flag is False, so
    that no NaN enters the optimizer state.
    """

    gradient_norm: jax.Array  # |g|
    update_norm: jax.Array  # s |u|, at the scale held before this step
    parameter_norm: jax.Array  # |p|, before the step
    relative_step: jax.Array  # s |u| / |p|, each leaf's u by the side of its matrix
    overshoot: jax.Array  # cos(g, p - mean of p) on the probe; > 0: the way was too far
    loss: jax.Array
    nonfinite_gradients: jax.Array  # int32, leaves
    nonfinite_updates: jax.Array  # int32, leaves
    nonfinite_loss: jax.Array  # int32, 0 or 1
    updates_broken: jax.Array  # bool, |u| overflows, or jumps beyond |p| and what came before
    parameters_broken: jax.Array  # bool, |p| is not finite, or jumps beyond what a step can do
    has_gradient: jax.Array  # bool
    has_step: jax.Array  # bool, relative_step is new
    has_overshoot: jax.Array  # bool, overshoot is new
    has_loss: jax.Array  # bool
    histogram: jax.Array  # int32[16], log2 |g| on the probe
    from_zero: jax.Array  # bool, all parameters were zero at first: no step is long for them


class Lengths(NamedTuple):
    """What `squares` gives of a step."""

    updates: jax.Array
    params: jax.Array | None


class Probe(NamedTuple):
    """What is remembered of the parameters at a fixed sample of coordinates; float32[n] each.

    Of at most 64 leaves, drawn by size; leaf l with n_l coordinates, drawn with probability q_l,
    gives m_l of them, weighted by sqrt(n_l / (m_l q_l)), so that inner products of probes estimate
    those of whole pytrees without bias.
    """

    mean_parameters: jax.Array  # over about half of the run
    parameters: jax.Array | None  # p_{t-1}; None where the guard sees the steps themselves


def init() -> Telemetry:
    """Telemetry before the first step: zeros, nothing measured."""
    real, whole, no = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32), jnp.array(False)
    return Telemetry(
        gradient_norm=real,
        update_norm=real,
        parameter_norm=real,
        relative_step=real,
        overshoot=real,
        loss=real,
        nonfinite_gradients=whole,
        nonfinite_updates=whole,
        nonfinite_loss=whole,
        updates_broken=no,
        parameters_broken=no,
        has_gradient=no,
        has_step=no,
        has_overshoot=no,
        has_loss=no,
        histogram=jnp.zeros([len(HISTOGRAM_EDGES)], jnp.int32),
        from_zero=no,
    )


def take_loss(value: Loss, extra_args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The loss among what `update` was given, and what the inner optimizer is given.

    It is `value`, or else `loss`. Without one the guard sees neither a loss that is not finite nor
    one that rises: that is a warning, when the step is traced.
    """
    value = extra_args.get("loss") if value is None else value
    if value is not None:
        return value, {**extra_args, "value": value}
    scalars = [name for name, x in extra_args.items() if _is_real_scalar(x)]
    hint = f" (is it {' or '.join(scalars)}, which it ignores?)" if scalars else ""
    warnings.warn(
        f"lbw_guard is given no loss{hint}: call update(grads, state, params, value=loss), or it "
        "cannot tell a loss that is not finite, nor one that rises.",
        UserWarning,
        stacklevel=3,
    )
    return None, extra_args


def observe_gradients(
    before: Telemetry,
    probe: Probe,
    gradients: PyTree,
    params: PyTree,
    value: Loss,
    age: jax.Array,
    of_leaves: jax.Array | None = None,
) -> tuple[Telemetry, Probe]:
    r"""Measure what arrives: gradients, loss, and whether the way of late was worth going.

    On the probe, with t = age + 1,

    .. math::
      c_t = \cos(g_t,\ p_t - \bar p_{t-1}), \qquad
      \bar p_t = \bar p_{t-1} + (p_t - \bar p_{t-1}) / \min(\max(t / 2, 4), t).

    While c is negative the loss still falls along the way from the run's own mean, and longer steps
    would have been better; above zero the mean is better than where the run stands, as it is where
    steps swing across a valley.

    Args:
      before: the telemetry of the step before.
      probe: what is remembered of the parameters.
      gradients: as they arrive.
      params: before the step; None where they are not known.
      value: the loss, or None.
      age: int32, steps taken since the law began, this one not counted.
      of_leaves: the gradients' `squares`, where they are known.

    Returns:
      The telemetry, and the probe with these parameters in its mean.
    """
    of_leaves = squares(gradients) if of_leaves is None else of_leaves
    norm, nonfinite = jnp.sqrt(jnp.sum(of_leaves)), _nonfinite(of_leaves)
    has_gradient = jnp.isfinite(norm)
    drawn = _draw(gradients)
    gradient = _weighted(drawn)
    here = jnp.zeros_like(gradient) if params is None else sample(params)
    require_same_leaves(gradient, probe.mean_parameters)
    way = here - probe.mean_parameters
    product = _length(gradient) * _length(way)
    has_overshoot = has_gradient & jnp.isfinite(product) & (product > 0) & (age > 0)
    steps = (age + 1).astype(jnp.float32)
    horizon = jnp.minimum(jnp.maximum(HORIZON * steps, LEAST_HORIZON), steps)
    mean = probe.mean_parameters + jnp.where(jnp.isfinite(way), way, 0.0) / horizon
    loss, has_loss, nonfinite_loss = _loss(value)
    seen = before._replace(
        gradient_norm=jnp.where(has_gradient, norm, before.gradient_norm),
        overshoot=_ratio(jnp.vdot(gradient, way), product, has_overshoot, before.overshoot),
        loss=jnp.where(has_loss, loss, before.loss),
        nonfinite_gradients=nonfinite,
        nonfinite_loss=nonfinite_loss,
        has_gradient=has_gradient,
        has_overshoot=has_overshoot,
        has_loss=has_loss,
        histogram=_histogram(drawn),
    )
    return seen, probe._replace(mean_parameters=mean)


def observe_step(
    seen: Telemetry,
    updates: PyTree,
    params: PyTree,
    scale: jax.Array,
    refused: jax.Array,
    governing: bool | jax.Array = True,
    lengths: Lengths | None = None,
) -> Telemetry:
    r"""Measure the step that the inner optimizer proposes, at the scale held so far.

    .. math::
      r = \frac{s}{|p|} \sqrt{\sum_l \frac{d_l}{96} |u_l|^2}

    d is the side of a leaf, min(rows, columns) of its most balanced shape as a matrix, at least 27;
    1 of a vector. An update has a stable rank of a few whatever the width, a fresh matrix one that
    goes with it, so the tuned |u| / |p| goes as 1 / sqrt(width), and r does not (the spectral
    condition, arXiv:2310.17813). It is missing where the parameters are, or are or were all zero.
    By the triangle inequality |p_t| <= |p_{t-1}| + |u_{t-1}|; more than twice that is corruption.
    Where the guard is not `governing`, the last step was taken at scale 1. Where the gradient was
    `refused` there is no step, whatever the optimizer made of the zeros.
    """
    if lengths is None:
        lengths = Lengths(squares(updates), None if params is None else squares(params))
    norm = scale * jnp.sqrt(jnp.sum(lengths.updates))
    sides = jnp.asarray(_sides(updates), jnp.float32)
    by_side = scale * jnp.sqrt(jnp.sum(lengths.updates * sides / SIDE))
    length = jnp.float32(0) if lengths.params is None else jnp.sqrt(jnp.sum(lengths.params))
    finite, from_zero = jnp.isfinite(norm), _from_zero(seen, length)
    has_step = finite & jnp.isfinite(length) & (norm > 0) & (length > 0)
    has_step = has_step & ~from_zero & ~refused
    known, last = seen.parameter_norm > 0, seen.update_norm / jnp.where(governing, 1.0, scale)
    reach = seen.parameter_norm + REACH * last
    # Nothing is known of a jump from no step at all, as accumulation makes them.
    jumps = (norm > length) & (norm > UPDATE_JUMP * seen.update_norm) & (seen.update_norm > 0)
    return seen._replace(
        updates_broken=~finite | (known & (length > 0) & jumps),
        parameters_broken=~jnp.isfinite(length) | (known & (length > PARAMETER_JUMP * reach)),
        update_norm=jnp.where(finite & ~refused, norm, seen.update_norm),
        parameter_norm=jnp.where(has_step, length, seen.parameter_norm),
        relative_step=_ratio(by_side, length, has_step, seen.relative_step),
        nonfinite_updates=_nonfinite(lengths.updates),
        has_step=has_step,
        from_zero=from_zero,
    )


def observe_moved(
    seen: Telemetry, last_step: jax.Array, params: PyTree, scale: jax.Array
) -> Telemetry:
    """As `observe_step`, for a guard that does not see the optimizer's step: the last one, probed.

    Args:
      seen: what the gradients showed.
      last_step: p_t - p_{t-1} on the probe.
      params: p_t; None where they are not known.
      scale: that the law holds.
    """
    if params is None:
        return seen._replace(has_step=jnp.array(False))
    norm, length = scale * _length(last_step), _length(sample(params))
    by_side = scale * _length(last_step * np.sqrt(_sides_on_the_probe(params) / SIDE))
    from_zero = _from_zero(seen, length)
    has_step = jnp.isfinite(norm) & jnp.isfinite(length) & (norm > 0) & (length > 0) & ~from_zero
    return seen._replace(
        parameters_broken=~jnp.isfinite(length),
        update_norm=jnp.where(has_step, norm, seen.update_norm),
        parameter_norm=jnp.where(has_step, length, seen.parameter_norm),
        relative_step=_ratio(by_side, length, has_step, seen.relative_step),
        has_step=has_step,
        from_zero=from_zero,
    )


def _from_zero(seen: Telemetry, length: jax.Array) -> jax.Array:
    """Whether the parameters were all zero before any of their steps was measured."""
    return seen.from_zero | ((seen.parameter_norm == 0) & (length == 0))


def follow(probe: Probe, updates: PyTree) -> Probe:
    """The probe where parameters are not given: as seen from them, their mean has moved back."""
    return probe._replace(mean_parameters=probe.mean_parameters - sample(updates))


def sample(tree: PyTree) -> jax.Array:
    """A pytree at its fixed coordinates: float32[n], replicated over devices.

    A complex leaf counts as its real and its imaginary part, one of integers not at all.
    """
    return _weighted(_draw(tree))


def sample_of_zeros(tree: PyTree) -> jax.Array:
    """The sample of a tree of zeros in these shapes, which may be abstract."""
    parts = _parts(_leaves(tree, jnp.inexact))
    return jnp.zeros([sum(_sample_size(part.leaf) for part in parts)], jnp.float32)


def is_abstract(tree: PyTree) -> bool:
    """Whether it holds shapes instead of arrays, as ``init`` is given by who wants shapes only."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _is_real_scalar(x: Any) -> bool:
    if isinstance(x, bool) or not isinstance(x, jax.Array | np.ndarray | np.generic | float | int):
        return False
    return jnp.shape(x) == () and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def wide_type(dtype: Any) -> Any:
    """The type that arithmetic on this one is done in: float32 for all narrower floats."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.float32 if narrow else dtype


def _leaves(tree: PyTree, kind: Any) -> list[Any]:
    """The non-empty leaves of this kind of number; abstract ones are as they are."""
    leaves = [
        leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), kind)
    ]
    return [leaf for leaf in leaves if leaf.size]


def squares(tree: PyTree) -> jax.Array:
    """The sum of squares of each leaf, reduced in float32 at least: float32[leaves]."""
    leaves = [leaf.astype(wide_type(leaf.dtype)) for leaf in _leaves(tree, jnp.inexact)]
    sums = [jnp.sum(jnp.real(leaf * jnp.conj(leaf))).astype(jnp.float32) for leaf in leaves]
    if not sums:
        return jnp.zeros([0], jnp.float32)
    # The sum of a stack XLA takes for a chain of additions, which it puts into every kernel that
    # reads it: as many operations as there are leaves, for each of them.
    return jax.lax.optimization_barrier(jnp.stack(sums))


def _nonfinite(squares: jax.Array) -> jax.Array:
    """How many leaves hold an element that is not finite, or whose square is none: int32."""
    return jnp.sum(~jnp.isfinite(squares), dtype=jnp.int32)


def _sides(tree: PyTree) -> list[float]:
    return [_side(leaf.shape) for leaf in _leaves(tree, jnp.inexact)]


def _side(shape: tuple[int, ...]) -> float:
    """The smaller side of that matrix, at least 27; 1 of a vector.

    >>> _side((512, 8, 64)), _side((3, 3, 64, 128)), _side((512, 8)), _side((512,))
    (512.0, 128.0, 27.0, 1.0)
    """
    return float(max(LEAST_SIDE, min(matrix_of(shape)))) if len(shape) > 1 else 1.0


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the most balanced matrix that these axes, in their order, make.

    >>> matrix_of((512, 8, 64)), matrix_of((3, 3, 64, 128)), matrix_of((512,))
    ((512, 512), (576, 128), (512, 1))
    """
    ends = range(1, len(shape)) if len(shape) > 1 else [len(shape)]
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in ends]
    return max(splits, key=min)


class _Part(NamedTuple):
    """What the probe takes of one leaf, or of its real or imaginary part."""

    leaf: Any
    weight: float


def _draw(tree: PyTree) -> list[tuple[jax.Array, float]]:
    """The probed coordinates of each probed leaf, as they are, and their weight."""
    parts = _parts(_leaves(tree, jnp.inexact))
    return [(_sample(part.leaf), part.weight) for part in parts]


def _weighted(drawn: list[tuple[jax.Array, float]]) -> jax.Array:
    return _concatenate([x * weight for x, weight in drawn])


def _parts(leaves: list[Any]) -> list[_Part]:
    """The probed leaves, a complex one twice."""
    drawn = _drawn_by_size([leaf.size for leaf in leaves])
    found = []
    for index, chance in drawn:
        leaf = leaves[index]
        weight = math.sqrt(leaf.size / _sample_size(leaf) / chance)
        for part in _real_parts(leaf):
            found.append(_Part(part, weight))
    return found


def _real_parts(leaf: Any) -> list[Any]:
    if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return [leaf]
    return [leaf] * 2 if isinstance(leaf, jax.ShapeDtypeStruct) else [leaf.real, leaf.imag]


def _drawn_by_size(sizes: list[int]) -> list[tuple[int, float]]:
    """At most `PROBE_LEAVES` leaves and the probability with which each is drawn.

    Systematic sampling: a leaf of more than its share of all coordinates is taken for certain, and
    of the others those in which the coordinates at even distances lie.

    >>> _drawn_by_size([10, 10]), _drawn_by_size([1] * 128)[:2]
    ([(0, 1.0), (1, 1.0)], [(0, 0.5), (2, 0.5)])
    >>> len(_drawn_by_size([1] * 500 + [1000]))
    64
    """
    places = PROBE_LEAVES
    if len(sizes) <= places:
        return [(i, 1.0) for i in range(len(sizes))]
    certain: set[int] = set()
    rest = sum(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] * places < rest:
            break
        certain.add(i)
        places, rest = places - 1, rest - sizes[i]
    drawn, passed = [], 0
    for i, size in enumerate(sizes):
        if i in certain:
            drawn.append((i, 1.0))
            continue
        # Whether a multiple of rest / places lies within this leaf's coordinates.
        if -(-passed * places // rest) * rest < (passed + size) * places:
            drawn.append((i, size * places / rest))
        passed += size
    return drawn


def _sides_on_the_probe(params: PyTree) -> np.ndarray:
    parts = _parts(_leaves(params, jnp.inexact))
    sides = [np.full(_sample_size(part.leaf), _side(part.leaf.shape)) for part in parts]
    return np.concatenate(sides).astype(np.float32) if sides else np.zeros(0, np.float32)


def require_same_leaves(sampled: jax.Array, before: jax.Array) -> None:
    """See that a sample is of leaves in the same shapes as the one before.

    Raises:
      ValueError: if it is not.
    """
    if sampled.shape != before.shape and parts.is_inside():
        raise ValueError(
            "Inside shard_map the gradients are parts of the parameters that init was given "
            f"({sampled.size} sampled coordinates, {before.size} then), and each device would "
            "judge its own: govern them outside of shard_map, under jit with shardings."
        )
    if sampled.shape != before.shape:
        raise ValueError(
            "The gradients have other leaves than the parameters that init was given "
            f"({sampled.size} sampled coordinates, {before.size} then): lbw_guard governs "
            "optimizers whose gradients have the shape of their parameters. Put "
            "optax.lookahead around it, optax.lookahead(lbw_guard(optax.adamw(lr)), ...)."
        )


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.vdot(x, x))


def _ratio(top: jax.Array, bottom: jax.Array, valid: jax.Array, otherwise: jax.Array) -> jax.Array:
    ratio = top / jnp.where(valid, bottom, 1.0)
    return jnp.where(valid & jnp.isfinite(ratio), ratio, otherwise)


def _loss(value: Loss) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss, whether there is a finite one, and 1 if it is given and not finite."""
    if value is None:
        return jnp.float32(0), jnp.array(False), jnp.int32(0)
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be the scalar loss of this step, got shape {jnp.shape(value)}: "
            "reduce it, for example with jnp.mean, before calling update."
        )
    loss = jnp.asarray(value, jnp.float32)
    finite = jnp.isfinite(loss)
    if jnp.result_type(value) == jnp.float64:  # beyond float32, it may be finite all the same
        most, finite = jnp.finfo(jnp.float32).max, jnp.isfinite(jnp.asarray(value, jnp.float64))
        loss = jnp.where(finite, jnp.clip(loss, -most, most), loss)
    return loss, finite, (~finite).astype(jnp.int32)


def _histogram(drawn: list[tuple[jax.Array, float]]) -> jax.Array:
    values = _concatenate([x for x, _ in drawn])
    finite = jnp.isfinite(values)
    _, exponent = jnp.frexp(jnp.where(finite, values, 0.0))
    bucket = jnp.where(values == 0, 0, (exponent - 1 - HISTOGRAM_EDGES[0]) // 2)
    bucket = jnp.clip(bucket, 0, len(HISTOGRAM_EDGES) - 1)
    empty = jnp.zeros([len(HISTOGRAM_EDGES)], jnp.int32)
    return empty.at[bucket].add(finite.astype(jnp.int32))


def _concatenate(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts) if parts else jnp.zeros([0], jnp.float32)


def _sample_size(leaf: Any) -> int:
    strides = _strides(leaf.shape)
    return math.prod(
        -(-length // stride) for length, stride in zip(leaf.shape, strides, strict=True)
    )


def _sample(leaf: jax.Array) -> jax.Array:
    sharding, strides = jax.typeof(leaf).sharding, _strides(leaf.shape)
    if AxisType.Explicit in sharding.mesh.axis_types:  # there a slice must divide into shards
        grid = np.ix_(*(np.arange(0, n, k) for n, k in zip(leaf.shape, strides, strict=True)))
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        taken = leaf.at[grid].get(mode="promise_in_bounds", out_sharding=replicated)
    else:
        taken = leaf[tuple(slice(None, None, stride) for stride in strides)]
    return taken.reshape(-1).astype(jnp.float32)


@functools.cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A grid over all axes, of about the wanted number of coordinates.

    The strides are primes, so that no structure in the axes, as of heads or of pairs, is met at
    the same place again and again. Six or more positions of an axis are on the grid, or all.

    >>> _strides((4096, 4096)), _strides((24, 96, 384)), _strides((7,))
    ((37, 29), (3, 7, 7), (1,))
    """
    size = math.prod(shape)
    excess = size / max(PROBE_LEAST, min(PROBE_MOST, size // PROBE_SHARE))
    strides = [1] * len(shape)
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    for place, axis in enumerate(order):
        wanted = min(excess ** (1 / (len(order) - place)), shape[axis] / PROBE_POSITIONS)
        if wanted > 1:
            strides[axis] = _prime_from(wanted)
            excess /= strides[axis]
    return tuple(strides)


def _prime_from(least: float) -> int:
    """The smallest prime that is no less."""
    number = max(2, math.ceil(least))
    while any(number % k == 0 for k in range(2, math.isqrt(number) + 1)):
        number += 1
    return number

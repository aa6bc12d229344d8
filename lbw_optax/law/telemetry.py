"""What one training step shows: every signal that the guard watches, and nothing else.

`observe_gradients` measures what arrives, `observe_step` what is about to be applied. Both read
whole pytrees and return float32 scalars; no decision is taken here.
"""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lbw_optax.types import Loss, PyTree

# A leaf contributes this share of its coordinates to the probe, within these bounds.
PROBE_SHARE, PROBE_LEAST, PROBE_MOST = 128, 1024, 16384
# Corruption of memory, no step of an optimizer: updates this many times as long as the last and
# longer than the parameters; parameters this many times as long as before.
UPDATE_JUMP, PARAMETER_JUMP = 1000.0, 2.0

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
    relative_step: jax.Array  # s |u| / |p| sqrt(nonzero_fraction)
    overshoot: jax.Array  # cos(g_t, u_{t-1}) on the probe; > 0: the last step went too far
    curvature: jax.Array  # <g_t - g_{t-1}, u_{t-1}> / |u_{t-1}|^2 on the probe
    loss: jax.Array
    nonfinite_gradients: jax.Array  # int32, elements
    nonfinite_updates: jax.Array  # int32, elements
    nonfinite_loss: jax.Array  # int32, 0 or 1
    updates_broken: jax.Array  # bool, |u| overflows, or jumps beyond |p| and what came before
    parameters_broken: jax.Array  # bool, |p| is not finite, or jumps beyond what a step can do
    has_gradient: jax.Array  # bool
    has_step: jax.Array  # bool, relative_step is new
    has_overshoot: jax.Array  # bool, overshoot and curvature are new
    has_loss: jax.Array  # bool
    histogram: jax.Array  # int32[16], log2 |g| on the probe
    nonzero_fraction: jax.Array  # share of the coordinates in leaves that were not zero at first


class Probe(NamedTuple):
    """A fixed sample of coordinates, remembered from one step to the next; float32[n] each.

    Leaf l with n_l coordinates gives m_l of them, weighted by sqrt(n_l / m_l), so that inner
    products of probes estimate those of whole pytrees without bias.
    """

    last_step: jax.Array  # u_{t-1}, as it was applied
    gradient: jax.Array  # g_{t-1}
    parameters: jax.Array | None  # p_{t-1}; None where the guard sees the steps themselves


def init(params: PyTree) -> Telemetry:
    """Telemetry before the first step: zeros, nothing measured."""
    real, whole, no = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32), jnp.array(False)
    return Telemetry(
        gradient_norm=real,
        update_norm=real,
        parameter_norm=real,
        relative_step=real,
        overshoot=real,
        curvature=real,
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
        nonzero_fraction=_nonzero_fraction(params),
    )


def take_loss(value: Loss, extra_args: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The loss among what `update` was given, and what the inner optimizer is given.

    It is `value`, or else `loss`. Without one the guard sees neither a loss that is not finite nor
    how far the run has come: that is a warning, when the step is traced.
    """
    value = extra_args.get("loss") if value is None else value
    if value is not None:
        return value, {**extra_args, "value": value}
    scalars = [name for name, x in extra_args.items() if _is_real_scalar(x)]
    hint = f" (is it {' or '.join(scalars)}, which it ignores?)" if scalars else ""
    warnings.warn(
        f"lbw_guard is given no loss{hint}: call update(grads, state, params, value=loss), or it "
        "cannot tell a loss that is not finite, nor how far the run has come.",
        UserWarning,
        stacklevel=3,
    )
    return None, extra_args


def observe_gradients(
    before: Telemetry, probe: Probe, gradients: PyTree, value: Loss
) -> tuple[Telemetry, Probe]:
    """Measure what arrives: gradients, loss, and how the last step turned out.

    overshoot = <g_t, u_{t-1}> / (|g_t| |u_{t-1}|) and
    curvature = <g_t - g_{t-1}, u_{t-1}> / |u_{t-1}|^2, both on the probe.

    Returns:
      The telemetry, and the probe with these gradients in it.
    """
    norm, nonfinite = norm_and_nonfinite(gradients)
    has_gradient = jnp.isfinite(norm)
    sampled, last_step = sample(gradients), probe.last_step
    _require_same_leaves(sampled, last_step)
    slope = jnp.vdot(sampled, last_step)
    product, step_square = _length(sampled) * _length(last_step), jnp.vdot(last_step, last_step)
    has_overshoot = has_gradient & jnp.isfinite(slope) & jnp.isfinite(product) & (product > 0)
    has_curvature = has_overshoot & (_length(probe.gradient) > 0)
    change = slope - jnp.vdot(probe.gradient, last_step)
    loss, has_loss, nonfinite_loss = _loss(value)
    seen = before._replace(
        gradient_norm=jnp.where(has_gradient, norm, before.gradient_norm),
        overshoot=_ratio(slope, product, has_overshoot, before.overshoot),
        curvature=_ratio(change, step_square, has_curvature, before.curvature),
        loss=jnp.where(has_loss, loss, before.loss),
        nonfinite_gradients=nonfinite,
        nonfinite_loss=nonfinite_loss,
        has_gradient=has_gradient,
        has_overshoot=has_overshoot,
        has_loss=has_loss,
        histogram=_histogram(gradients),
    )
    return seen, probe._replace(gradient=sampled)


def observe_step(seen: Telemetry, updates: PyTree, params: PyTree, scale: jax.Array) -> Telemetry:
    """Measure the step that the inner optimizer proposes, at the scale held so far.

    relative_step = scale |u| / |p| sqrt(nonzero_fraction), root mean squares of the step over all
    coordinates and of the parameters over those that started with a size: LoRA's zero-initialised
    factor moves, and has no length to be compared with. It is missing where the parameters are, or
    are all zero.
    By the triangle inequality |p_t| <= |p_{t-1}| + |u_{t-1}|; more than twice that is corruption.
    """
    norm, nonfinite = norm_and_nonfinite(updates)
    norm = scale * norm
    length = jnp.float32(0) if params is None else norm_and_nonfinite(params)[0]
    finite = jnp.isfinite(norm)
    has_step = finite & jnp.isfinite(length) & (norm > 0) & (length > 0)
    known, reach = seen.parameter_norm > 0, seen.parameter_norm + 2 * seen.update_norm
    # Nothing is known of a jump from no step at all, as accumulation makes them.
    jumps = (norm > length) & (norm > UPDATE_JUMP * seen.update_norm) & (seen.update_norm > 0)
    return seen._replace(
        updates_broken=~finite | (known & (length > 0) & jumps),
        parameters_broken=~jnp.isfinite(length) | (known & (length > PARAMETER_JUMP * reach)),
        update_norm=jnp.where(finite, norm, seen.update_norm),
        parameter_norm=jnp.where(has_step, length, seen.parameter_norm),
        relative_step=_relative(seen, norm, length, has_step),
        nonfinite_updates=nonfinite,
        has_step=has_step,
    )


def observe_moved(seen: Telemetry, probe: Probe, here: jax.Array, scale: jax.Array) -> Telemetry:
    """As `observe_step`, for a guard that does not see the optimizer's step: the last one, probed.

    relative_step = scale |p_t - p_{t-1}| / |p_t| sqrt(nonzero_fraction) on the probe, where `here`
    samples p_t.
    """
    norm, length = scale * _length(probe.last_step), _length(here)
    has_step = jnp.isfinite(norm) & jnp.isfinite(length) & (norm > 0) & (length > 0)
    return seen._replace(
        parameters_broken=~jnp.isfinite(length),
        update_norm=jnp.where(has_step, norm, seen.update_norm),
        parameter_norm=jnp.where(has_step, length, seen.parameter_norm),
        relative_step=_relative(seen, norm, length, has_step),
        has_step=has_step,
    )


def forget(probe: Probe) -> Probe:
    """The probe after a rejected step: no step was taken, and its gradient is not compared with."""
    nothing = jnp.zeros_like(probe.gradient)
    return probe._replace(last_step=nothing, gradient=nothing)


def sample(tree: PyTree, like: PyTree = None) -> jax.Array:
    """A pytree at its fixed coordinates: float32[n], replicated over devices.

    A complex leaf counts as its real and its imaginary part, one of integers not at all. With
    `like` it is that tree's numbers that tell: updates may be floats where gradients are integers.
    """
    return _concatenate([_sample(leaf) * _weight(leaf) for leaf in _sampled_leaves(tree, like)])


def sample_of_zeros(tree: PyTree) -> jax.Array:
    """The sample of a tree of zeros in these shapes, which may be abstract."""
    sizes = [_sample_size(x) * (1 + _is_complex(x)) for x in _leaves(tree, jnp.inexact)]
    return jnp.zeros([sum(sizes)], jnp.float32)


def is_abstract(tree: PyTree) -> bool:
    """Whether it holds shapes instead of arrays, as ``init`` is given by who wants shapes only."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def norm_and_nonfinite(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """Global norm, reduced in float32, and the number of non-finite elements (int32).

    The elements are counted only where the norm says that there are any: the common path reads
    the tree once.
    """
    leaves = _leaves(tree, jnp.inexact)
    wide = [leaf.astype(wide_type(leaf.dtype)) for leaf in leaves]
    norm = jnp.asarray(optax.tree.norm(wide), jnp.float32)

    def count() -> jax.Array:
        counts = [jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32) for leaf in leaves]
        return sum(counts, jnp.int32(0))

    return norm, jax.lax.cond(jnp.isfinite(norm), lambda: jnp.int32(0), count)


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


def _sampled_leaves(tree: PyTree, like: PyTree) -> list[jax.Array]:
    if like is not None:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
        tree = [x for x, y in pairs if jnp.issubdtype(jnp.result_type(y), jnp.inexact)]
    parts = []
    for leaf in _leaves(tree, jnp.inexact):
        parts += [leaf.real, leaf.imag] if _is_complex(leaf) else [leaf]
    return parts


def _is_complex(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.complexfloating))


def _require_same_leaves(sampled: jax.Array, before: jax.Array) -> None:
    if sampled.shape != before.shape:
        raise ValueError(
            "The gradients have other leaves than the parameters that init was given "
            f"({sampled.size} sampled coordinates, {before.size} then): lbw_guard governs "
            "optimizers whose gradients have the shape of their parameters. Put "
            "optax.lookahead around it, optax.lookahead(lbw_guard(optax.adamw(lr)), ...)."
        )


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.vdot(x, x))


def _nonzero_fraction(params: PyTree) -> jax.Array:
    """Share of the coordinates in leaves that are not all zero; 1 if there are none."""
    leaves = _leaves(params, jnp.inexact)
    sizes = [jnp.where(_has_size(leaf), float(leaf.size), 0.0) for leaf in leaves]
    # As a float: an int beyond 2^31 is none that JAX can take.
    share = sum(sizes, jnp.float32(0)) / float(max(sum(leaf.size for leaf in leaves), 1))
    return jnp.where(share > 0, share, 1.0)


def _has_size(leaf: Any) -> jax.Array:
    """Whether it is not all zero; of an abstract leaf that is not known, and taken for granted."""
    return jnp.array(True) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.any(leaf != 0)


def _relative(
    seen: Telemetry, norm: jax.Array, length: jax.Array, has_step: jax.Array
) -> jax.Array:
    return _ratio(norm * jnp.sqrt(seen.nonzero_fraction), length, has_step, seen.relative_step)


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
    return loss, finite, (~finite).astype(jnp.int32)


def _histogram(gradients: PyTree) -> jax.Array:
    values = _concatenate([_sample(leaf) for leaf in _sampled_leaves(gradients, None)])
    finite = jnp.isfinite(values)
    _, exponent = jnp.frexp(jnp.where(finite, values, 0.0))
    bucket = jnp.where(values == 0, 0, (exponent - 1 - HISTOGRAM_EDGES[0]) // 2)
    bucket = jnp.clip(bucket, 0, len(HISTOGRAM_EDGES) - 1)
    empty = jnp.zeros([len(HISTOGRAM_EDGES)], jnp.int32)
    return empty.at[bucket].add(finite.astype(jnp.int32))


def _concatenate(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts) if parts else jnp.zeros([0], jnp.float32)


def _sample_size(leaf: Any) -> int:
    return min(leaf.size, max(PROBE_LEAST, min(PROBE_MOST, leaf.size // PROBE_SHARE)))


def _weight(leaf: jax.Array) -> float:
    return math.sqrt(leaf.size / _sample_size(leaf))


def _sample(leaf: jax.Array) -> jax.Array:
    taken = leaf.reshape(1) if leaf.ndim == 0 else _gather(leaf, _sample_size(leaf))
    return taken.astype(jnp.float32)


def _gather(leaf: jax.Array, size: int) -> jax.Array:
    sharding = jax.typeof(leaf).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if explicit else None
    index = _coordinates(leaf.shape, size)
    return leaf.at[index].get(mode="promise_in_bounds", out_sharding=replicated)


def _coordinates(shape: tuple[int, ...], size: int) -> tuple[jax.Array, ...]:
    """Distinct positions, spread evenly over rows and columns, without a flat index.

    Rows go evenly from the first to the last; columns step by about the golden ratio, coprime to
    their number. No product passes 2^32, however large the leaf.
    """
    columns, rows = shape[-1], math.prod(shape[:-1])
    stride = max(1, min(round(0.618 * columns), 2**17))
    while math.gcd(stride, columns) != 1:
        stride -= 1
    k = jnp.arange(size, dtype=jnp.uint32)
    row = k * (rows // size) + k * (rows % size) // size
    index = [k * stride % columns]
    for length in reversed(shape[:-1]):
        index.append(row % length)
        row = row // length
    return tuple(part.astype(jnp.int32) for part in reversed(index))

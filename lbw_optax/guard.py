"""The guard: observe, judge, act, above any Optax optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbw_optax.law import control, divergence, events, statistics, telemetry
from lbw_optax.law.telemetry import Probe, Telemetry
from lbw_optax.state import MODES, GuardState, require


def lbw_guard(
    inner: optax.GradientTransformation | None = None,
    *,
    min_scale: float = 0.001,
    max_skips: int = 30,
    max_interventions: int = 50,
    mode: str = "govern",
) -> optax.GradientTransformationExtraArgs:
    r"""Keep a training run alive under stress: scale and skip the updates of ``inner``.

    With g_t the gradients, u_t the updates of ``inner`` and p_t the parameters, the guard applies

    .. math::
      s_t\, u_t, \qquad
      \log s_t = \mathrm{clip}\big(\log s_{t-1} + \mathrm{clip}(-0.05\, a_t, -0.4, \gamma_t),\
      \log s_{\min},\ 0\big).

    The alarm a_t weighs overshoot (the cosine of g_t with the step just taken, in standard
    errors), the relative step r_t = s_{t-1} |u_t| / |p_t| (times √ν, with ν the share of
    coordinates in leaves that were not zero at the start) and the progress of the loss; the growth
    bound lies between 0.1 and 0.5 and is slow near r = 0.01, and until the first alarm the gain
    far below it is up to three times as large; see :mod:`lbw_optax.law.control`. A step
    above r = 0.03 is cut to that at once, by ten at most. Soft start: the first step is scaled to
    r = 0.001. A step with a non-finite gradient, loss or
    update, with a gradient norm that jumps, or with an update a thousand times as long as the last
    and longer than the parameters, changes neither the parameters nor the state of ``inner``. Where
    that is not enough, the state asks for a rollback (:mod:`lbw_optax.law.divergence`), which
    :class:`lbw_optax.RollbackManager` answers.

    Placement decides authority. Wrapped around an optimizer, the guard governs it. Chained before
    one, ``optax.chain(lbw_guard(), optax.adamw(lr))``, it scales and zeroes gradients: AdamW
    undoes a constant gradient scale, and its momentum and weight decay move the weights on a
    zero gradient, so that this placement keeps NaN out but does not cure a learning rate that is
    too high. Measured in LoRA at 100 times the tuned rate (``benchmarks/results/placements.json``):
    perplexity 435 for bare AdamW, 422 chained, 53 wrapped, and 53 at the tuned rate; after one NaN
    gradient the weights are all NaN, move by 0.1 %, and do not move.

    Args:
      inner: the optimizer to govern; None for a transformation of gradients, to be chained.
      min_scale: the smallest scale, in (0, 1].
      max_skips: after this many skipped steps in a row the state is exhausted and
        :func:`lbw_optax.check` raises; skipping itself goes on.
      max_interventions: the budget: skips, cuts and holds that may be outstanding; one is earned
        back in ten steps. When it is spent the state is exhausted too.
      mode: "govern", or "observe" to watch and decide but apply what ``inner`` proposes.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes the optional keyword
      ``value``, the scalar loss; other keywords go to ``inner``.

    Raises:
      ValueError: if an argument is out of its range, or ``value`` is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lbw_optax import lbw_guard, metrics
      >>> loss = lambda w: jnp.sum((w - 1) ** 2)
      >>> tx = lbw_guard(optax.adamw(1e-2))
      >>> w = jnp.full(3, 2.0)
      >>> state = tx.init(w)
      >>> value, grads = jax.value_and_grad(loss)(w)
      >>> updates, state = tx.update(grads * jnp.nan, state, w, value=value)
      >>> print(optax.apply_updates(w, updates), metrics(state)["skips"])
      [2. 2. 2.] 1

    References:
      The gradient's product with the last step as the derivative of the loss with respect to
      the step size is the hypergradient of Baydin et al., 2018 (arXiv:1703.04782).
    """
    bounds = control.Bounds(min_scale, max_skips, max_interventions)
    _validate(inner, bounds, mode)
    wrapped = inner is not None
    governed = optax.with_extra_args_support(inner if wrapped else optax.identity())

    def init_fn(params: Any) -> GuardState:
        nothing = jnp.zeros_like(telemetry.probe(params))
        state = GuardState(
            inner_state=None,
            guard_steps=jnp.zeros([], jnp.int32),
            mode=jnp.asarray(MODES.index(mode), jnp.int32),
            telemetry=telemetry.init(params),
            probe=Probe(anchor=nothing if wrapped else telemetry.probe(params), gradient=nothing),
            statistics=statistics.init(),
            control=control.init(bounds),
            distress=divergence.init(),
            ring=events.init(),
        )
        # A buffer that two leaves share cannot be donated.
        return jax.tree.map(jnp.copy, state)._replace(inner_state=governed.init(params))

    def update_fn(
        updates: Any, state: GuardState, params: Any = None, *, value: Any = None, **extra_args: Any
    ) -> tuple[Any, GuardState]:
        require(state)
        if value is not None:
            extra_args["value"] = value
        proposed, inner_state = governed.update(updates, state.inner_state, params, **extra_args)
        seen, probe = _observe(state, updates, proposed, params, value, wrapped)

        why = control.poison(seen, state.statistics)
        new_statistics = statistics.absorb(state.statistics, seen, why > 0)
        evidence = control.judge(state.control, seen, state.statistics, new_statistics, why)
        new_control, decision = control.decide(state.control, evidence, bounds)

        governing = state.mode == MODES.index("govern")
        skip = governing & decision.skip
        applied = _apply(proposed, jnp.where(governing, decision.scale, 1.0), skip)
        if wrapped:
            probe = probe._replace(anchor=telemetry.probe(applied))
        return applied, GuardState(
            inner_state=_select(skip, state.inner_state, inner_state),
            guard_steps=optax.safe_increment(state.guard_steps),
            mode=state.mode,
            telemetry=seen,
            probe=_select(decision.skip, telemetry.forget(probe, wrapped), probe),
            statistics=new_statistics,
            control=new_control,
            distress=divergence.assess(
                state.distress, seen, state.statistics, why, new_control.skips_in_a_row
            ),
            ring=events.record(state.ring, state.guard_steps, new_control, evidence, decision),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _observe(
    state: GuardState, gradients: Any, proposed: Any, params: Any, value: Any, wrapped: bool
) -> tuple[Telemetry, Probe]:
    """Measure one step; the probe returned holds this step's gradient and, chained, its params."""
    before, remembered = state.telemetry, state.probe
    if wrapped:
        seen, sampled = telemetry.observe_gradients(
            before, remembered, gradients, remembered.anchor, value
        )
        scale = jnp.exp(state.control.log_scale)
        return telemetry.observe_step(seen, proposed, params, scale), Probe(
            anchor=remembered.anchor, gradient=sampled
        )
    here = remembered.anchor if params is None else telemetry.probe(params)
    moved = here - remembered.anchor
    seen, sampled = telemetry.observe_gradients(before, remembered, gradients, moved, value)
    return telemetry.observe_moved(seen, moved, here), Probe(anchor=here, gradient=sampled)


def _apply(updates: Any, scale: jax.Array, skip: jax.Array) -> Any:
    """s u in the dtype of u, and nothing at all on a skipped step."""

    def act(u: jax.Array) -> jax.Array:
        if u.dtype == jax.dtypes.float0:  # what JAX gives for the gradient of an integer
            return u
        if not jnp.issubdtype(u.dtype, jnp.inexact):
            return jnp.where(skip, jnp.zeros_like(u), u)
        scaled = (u * scale.astype(jnp.promote_types(u.dtype, jnp.float32))).astype(u.dtype)
        # Adding -0.0 leaves every float as it is; adding 0.0 would turn -0.0 into 0.0.
        return jnp.where(skip, jnp.full_like(u, -0.0), scaled)

    return jax.tree.map(act, updates)


def _select(skip: jax.Array, old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(skip, x, y), old, new)


def _validate(inner: Any, bounds: control.Bounds, mode: str) -> None:
    if not (inner is None or _is_optimizer(inner)):
        raise ValueError(f"inner must be an Optax optimizer or None, got {inner!r}.")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if not _holds(bounds.min_scale, lambda x: 0 < x <= 1):
        raise ValueError(f"min_scale must be a number in (0, 1], got {bounds.min_scale!r}.")
    for name in ("max_skips", "max_interventions"):
        count = getattr(bounds, name)
        if not _holds(count, lambda x: x >= 1):
            raise ValueError(f"{name} must be a number of at least 1, got {count!r}.")


def _is_optimizer(inner: Any) -> bool:
    """`MultiSteps` is one, though no `GradientTransformation`; a class that makes them is not."""
    has_both = callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))
    return has_both and not isinstance(inner, type)


def _holds(x: Any, condition: Callable[[Any], Any]) -> bool:
    """Whether x is a number of which the condition is true; a traced one is not looked at."""
    if isinstance(x, jax.core.Tracer):
        return True
    return np.ndim(x) == 0 and np.issubdtype(np.asarray(x).dtype, np.number) and bool(condition(x))

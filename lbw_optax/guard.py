"""The guard: observe, judge, act, above any Optax optimizer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbw_optax import chained, law, parts
from lbw_optax import state as states
from lbw_optax.activations import Activations
from lbw_optax.apply import either, scaled
from lbw_optax.attention import QKClipState
from lbw_optax.chained import ChainedGuard
from lbw_optax.freeze import Freeze
from lbw_optax.frozen import Frozen
from lbw_optax.groups import Grouping
from lbw_optax.law import classifier, control, events, freezing, layers, telemetry
from lbw_optax.law import custom as customs
from lbw_optax.law.control import RULES, Bounds, Rules, Signal
from lbw_optax.law.custom import Custom, Measure, Policy
from lbw_optax.law.freezing import Limits
from lbw_optax.law.telemetry import Probe
from lbw_optax.state import MODES, GuardState, Mode
from lbw_optax.types import Loss, PyTree

DEFAULTS = Bounds()
# A quarter of the groups, for as long as a rollback goes back at most.
MAX_FROZEN, MAX_FREEZE_STEPS = 0.25, 50


def lbw_guard(
    inner: optax.GradientTransformation | None = None,
    *,
    min_scale: float = DEFAULTS.min_scale,
    max_skips: int = DEFAULTS.max_skips,
    max_interventions: int = DEFAULTS.max_interventions,
    mode: str = "govern",
    groups: Grouping | None = None,
    max_frozen: float = MAX_FROZEN,
    max_freeze_steps: int = MAX_FREEZE_STEPS,
    signals: Mapping[str, Measure] | None = None,
    constraints: Mapping[str, Measure] | None = None,
    policy: Policy | None = None,
    adapt_risk: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep a training run alive under stress: scale and skip the updates of ``inner``.

    With g_t the gradients, u_t the updates of ``inner``, p_t the parameters and t the steps taken,
    the guard applies

    .. math::
      s_t\, u_t, \qquad \log s_t = \log s_{t-1}
      - a_t \min\big(0.4,\ (2 \text{ if } a_t < 0 \text{ else } 1.5) / t\big), \qquad r_t
      \le 0.0015 \sqrt{t}, \qquad s_t \in [s_{\min}, 1].

    The alarm a_t in [-1, 1] is the mean overshoot in standard deviations, less 1: the cosine of g_t
    with the way from the mean of the parameters over about half of the run. The relative step r_t
    is s |u| / |p|, each leaf of u counted by the side of its matrix, so that one ceiling fits every
    width; it is up to twice as high where steps fall far short of what the run could take; see
    :mod:`lbw_optax.law.control`. Soft start: the first step is scaled to r = 0.001. A
    step with a non-finite gradient or loss changes neither the parameters nor the state of
    ``inner``; one with a non-finite update, or an update a thousand times as long as the last and
    longer than the parameters, does not change the parameters. A gradient whose norm jumps is
    scaled back to the length that the run has shown. Where that is not enough, the state asks for a
    rollback (:mod:`lbw_optax.law.divergence`), which :class:`lbw_optax.RollbackManager` answers.

    Placement decides authority. Wrapped around an optimizer, or at the head of
    :func:`lbw_optax.chain`, the guard governs it. Chained before one with :func:`optax.chain` it
    sees gradients only: it keeps bad ones out, limits those that jump, and reports, but it
    does not hold a learning rate that is too high; see :mod:`lbw_optax.chained`.

    Args:
      inner: the optimizer to govern; None for a transformation of gradients, to be chained.
      min_scale: the smallest scale, in (0, 1].
      max_skips: after this many skipped steps in a row the state is exhausted and
        :func:`lbw_optax.check` raises; skipping itself goes on.
      max_interventions: the budget: skips and cuts that may be outstanding; one is earned back in
        ten steps. A step that is skipped when it is spent leaves the state exhausted too.
      mode: "govern", or "observe" to watch and decide but apply what ``inner`` proposes.
      groups: which layers may be frozen alone, while the rest trains: a function from the path of
        a leaf, its keys with "/" between them, to the name of its group, or None; for example
        :func:`lbw_optax.by_layer`. Of a name that ends in "[*]" each slice along the leaves' first
        axis is a group. None: nothing is frozen; see :mod:`lbw_optax.law.freezing`.
      max_frozen: the share of the groups that may be frozen at a time, in (0, 1).
      max_freeze_steps: in a row that a group may be frozen; then it trains for as long.
      signals: signals of your own by name: functions from a :class:`lbw_optax.law.custom.Step` to a
        number. One that jumps limits the gradient and holds the scale, as a jump of the loss does.
      constraints: likewise, functions to a bool that is to be true; one that is false counts as a
        jump. Each of them acts in at most ten steps that are not earned back, one in ten steps.
      policy: a function ``(risk, kinds, bounds)`` of the classifier's probability of a divergence
        within ten steps and of the kinds of trouble, to the share of the law's step to take; at
        least a tenth, at most 1.
      adapt_risk: the classifier goes on learning in the run, within a ball around the weights that
        it was shipped with; see :mod:`lbw_optax.law.adapting`. Without a policy no decision of the
        guard is another one.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes the optional keyword
      ``value`` (or ``loss``), the scalar loss, and ``activations``, a mapping from the names of
      layers to what :func:`lbw_optax.activation_outliers` gives: it is reported, nothing is decided
      by it, and ``inner`` is not given it. Other keywords go to ``inner``.

    Raises:
      ValueError: if an argument is out of its range, ``value`` is not a scalar, or ``activations``
        are none; from ``init``, if ``groups`` makes fewer than two groups, or so few that none may
        be frozen.

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
    bounds = Bounds(min_scale, max_skips, max_interventions)
    _validate(inner, bounds, mode)
    if not isinstance(adapt_risk, bool):
        raise ValueError(f"adapt_risk must be True or False, got {adapt_risk!r}.")
    if groups is not None:
        _validate_freezing(groups, max_frozen, max_freeze_steps)
    freeze = None if groups is None else Freeze(groups, _limits(max_frozen, max_freeze_steps))
    custom = _custom(signals or {}, constraints or {}, policy)
    if inner is None:
        return chained.watch(bounds, mode, freeze, custom, adapts=adapt_risk)
    return govern(inner, bounds, mode, freeze=freeze, custom=custom, adapts=adapt_risk)


def chain(*transformations: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """As :func:`optax.chain`, but a guard in it governs all that follows.

    ``lbw_optax.chain(a, lbw_guard(), b, c)`` is ``optax.chain(a, lbw_guard(optax.chain(b, c)))``.

    Raises:
      ValueError: if there is no ``lbw_guard()`` among them, or several, or nothing follows it.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> tx = lbw_optax.chain(lbw_optax.lbw_guard(), optax.adamw(3e-3))
      >>> state = tx.init(jnp.ones(3))
    """
    places = [i for i, tx in enumerate(transformations) if isinstance(tx, ChainedGuard)]
    if len(places) != 1 or places[0] == len(transformations) - 1:
        raise ValueError(
            "lbw_optax.chain takes one lbw_guard(), without an optimizer in it, and after it what "
            f"it is to govern; got {len(places)} of them among {len(transformations)} "
            "transformations: write lbw_optax.chain(lbw_guard(), optax.adamw(...))."
        )
    guard = transformations[places[0]]
    before, after = transformations[: places[0]], transformations[places[0] + 1 :]
    for tx in (*before, *after):
        _require_optimizer(tx)
    inner = after[0] if len(after) == 1 else optax.chain(*after)
    governed = govern(
        inner,
        guard.bounds,
        guard.mode,
        freeze=guard.freeze,
        custom=guard.custom,
        adapts=guard.adapts,
    )
    return optax.chain(*before, governed) if before else governed


def adamw(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw`, governed: ``lbw_guard(optax.adamw(...))``.

    Takes the arguments of :func:`optax.adamw`. For other limits than the default ones, write
    ``lbw_guard(optax.adamw(...), min_scale=...)``.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> tx = lbw_optax.adamw(3e-3, weight_decay=0.01)
      >>> state = tx.init(jnp.ones(3))
    """
    return lbw_guard(optax.adamw(*args, **kwargs))


adamw.__wrapped__ = optax.adamw  # type: ignore[attr-defined]  # inspect.signature shows its own


def govern(
    inner: optax.GradientTransformation,
    bounds: Bounds,
    mode: str,
    rules: Rules = RULES,
    freeze: Freeze | None = None,
    custom: Custom | None = None,
    *,
    adapts: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The guard around an optimizer; `rules` are the law's own but in experiments."""
    inner = _with_extra_args(inner)
    frozen = Frozen(inner.update)

    def init_fn(params: PyTree) -> GuardState:
        probe = Probe(telemetry.sample_of_zeros(params), parameters=None)
        inner_state = inner.init(params)
        _refuse_what_goes_around(inner_state)
        _refuse_a_guard(inner_state)
        names = freeze.names(params) if freeze else None
        own = states.init(probe, bounds, mode, names, custom, adapts=adapts)
        return own._replace(inner_state=inner_state)

    def update_fn(
        updates: PyTree,
        state: GuardState,
        params: PyTree = None,
        *,
        value: Loss = None,
        activations: Activations | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GuardState]:
        states.require(state)
        state = states.as_arrays(state)
        value, extra_args = telemetry.take_loss(value, extra_args)
        parts.refuse(state, updates, params, value, activations)
        gradients, trained = frozen.zeroed(updates, state.inner_state, params, extra_args)
        age, governing = state.law.control.age, state.mode == Mode.GOVERN
        if freeze:
            # Before the groups are counted: other leaves have others, and that is not the cause.
            leaves = telemetry.sample_of_zeros(updates)
            telemetry.require_same_leaves(leaves, state.probe.mean_parameters)
            arrived, gradients, updates = freeze.arrive(
                state.freezing, gradients, updates, governing
            )
        seen, probe = telemetry.observe_gradients(
            state.telemetry,
            state.probe,
            gradients,
            trained,
            value,
            age,
            arrived.of_leaves if freeze else None,
        )
        arrival, alarm = control.arrive(seen, state.law.statistics), None
        if custom:
            given = customs.Step(seen.loss, updates, params, extra_args)
            watched, noticed = customs.look(custom, state.custom, given)
            arrival, alarm = control.heed(arrival, noticed.acts), noticed.acts
        refused = governing & (arrival.rejected != Signal.NONE)
        # Known before the optimizer runs, so that what keeps its state as it was is part of its own
        # element-wise operations, and no second copy of that state is held.
        limited = scaled(updates, jnp.exp(jnp.where(governing, arrival.log_factor, 0.0)), refused)
        proposed, inner_state = inner.update(limited, state.inner_state, params, **extra_args)
        if freeze:
            looked, proposed, lengths = freeze.propose(arrived, proposed, trained, refused)
        scale_before = jnp.exp(state.law.control.log_scale)
        seen = telemetry.observe_step(
            seen,
            proposed,
            trained,
            scale_before,
            refused,
            governing,
            lengths if freeze else None,
        )
        new_law, decision = law.step(state.law, seen, bounds, rules, alarm)
        if custom:
            watched, decision = customs.shorten(
                custom, watched, new_law.classifier.risk, decision, bounds
            )
        reported = classifier.reported(decision, state.law.classifier, new_law.classifier)
        which = None
        if custom:
            reported, which = customs.tell(state.custom, watched, noticed, reported)
        if freeze:
            looked, news = freezing.tell(looked, reported, freeze.limits)
        scale = jnp.where(governing, decision.scale, 1.0)
        applied = scaled(proposed, scale, governing & decision.skip)
        if params is None:
            probe = telemetry.follow(probe, applied)
        inner_state = either(refused, state.inner_state, inner_state)
        if freeze:
            inner_state = freeze.keep(arrived, state.inner_state, inner_state, updates)
        return applied, GuardState(
            inner_state=inner_state,
            guard_steps=optax.safe_increment(state.guard_steps),
            mode=state.mode,
            telemetry=seen,
            probe=probe,
            law=new_law,
            events=(
                freezing.record(state.events, state.guard_steps, news, seen.loss, which)
                if freeze
                else events.record(state.events, state.guard_steps, reported, seen.loss, which)
            ),
            layers=layers.absorb(state.layers, activations),
            freezing=looked if freeze else state.freezing,
            custom=watched if custom else state.custom,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_extra_args(inner: optax.GradientTransformation) -> Any:
    """As `optax.with_extra_args_support`, which `MultiSteps` would get none of its own from."""
    parameters = inspect.signature(inner.update).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return inner
    return optax.with_extra_args_support(inner)


def _refuse_what_goes_around(inner_state: PyTree) -> None:
    """What does not stay right when its updates are scaled, or does nothing there."""
    for kind, sentence in _AROUND.items():
        if any(isinstance(node, kind) for node in _nodes(inner_state, kind)):
            raise ValueError(sentence)


_AROUND = {
    QKClipState: (
        "lbw_optax.qk_clip acts on the parameters, whatever the guard thinks of the step, and the "
        "guard keeps activations to itself: put it behind the guard, "
        "optax.chain(lbw_guard(optimizer), lbw_optax.qk_clip())."
    ),
    optax.contrib.SAMState: (
        "optax.contrib.sam steps to and fro, which the guard would hold for divergence: put "
        "the guard inside, optax.contrib.sam(lbw_guard(optimizer), adversarial_optimizer)."
    ),
    optax.contrib.ScheduleFreeState: (
        "optax.contrib.schedule_free keeps a second copy of the parameters, which would not follow "
        "updates that the guard has scaled: put the guard inside, "
        "optax.contrib.schedule_free(lbw_guard(optax.adamw(lr, b1=0.0)), lr)."
    ),
}


def _refuse_a_guard(inner_state: PyTree) -> None:
    if any(isinstance(node, GuardState) for node in _nodes(inner_state, GuardState)):
        raise ValueError(
            "This lbw_guard governs an optimizer with another lbw_guard in it, and two guards "
            "would both scale each step: leave one of them out."
        )


def _nodes(tree: PyTree, kind: type) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))


def _validate(inner: Any, bounds: Bounds, mode: str) -> None:
    if inner is not None:
        _require_optimizer(inner)
    if not (isinstance(mode, str) and mode in MODES):
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if not _holds(bounds.min_scale, lambda x: 0 < x <= 1):
        raise ValueError(f"min_scale must be a number in (0, 1], got {bounds.min_scale!r}.")
    for name in ("max_skips", "max_interventions"):
        count = getattr(bounds, name)
        if not _holds(count, lambda x: x >= 1):
            raise ValueError(f"{name} must be a number of at least 1, got {count!r}.")


def _validate_freezing(groups: Any, max_frozen: Any, max_freeze_steps: Any) -> None:
    if not callable(groups):
        raise ValueError(
            "groups must be a function from the path of a leaf to the name of its group, as "
            f"lbw_optax.by_layer is, or None, got {groups!r}."
        )
    if not _holds(max_frozen, lambda x: 0 < x < 1):
        raise ValueError(f"max_frozen must be a number between 0 and 1, got {max_frozen!r}.")
    if not _holds(max_freeze_steps, lambda x: x >= 1 and x % 1 == 0):
        raise ValueError(
            f"max_freeze_steps must be a whole number of at least 1, got {max_freeze_steps!r}."
        )


def _limits(max_frozen: Any, max_freeze_steps: Any) -> Limits:
    """With as many steps as a counter can hold; a traced number is as it is."""
    if not isinstance(max_freeze_steps, jax.core.Tracer):
        max_freeze_steps = int(min(max_freeze_steps, np.iinfo(np.int32).max))
    return Limits(max_frozen, max_freeze_steps)


def _custom(signals: Any, constraints: Any, policy: Any) -> Custom | None:
    for name, given in (("signals", signals), ("constraints", constraints)):
        if not isinstance(given, Mapping) or not all(map(callable, given.values())):
            raise ValueError(
                f"{name} must be a mapping from names to functions of a step, got {given!r}."
            )
    twice = set(signals) & set(constraints) | {"policy"} & {*signals, *constraints}
    if twice or not all(isinstance(name, str) and name for name in (*signals, *constraints)):
        raise ValueError(
            "Each signal and constraint needs a name of its own, a str, and not 'policy': got "
            f"{[*signals, *constraints]!r}."
        )
    if policy is not None and not callable(policy):
        raise ValueError(f"policy must be a function (risk, kinds, bounds), got {policy!r}.")
    return Custom(signals, constraints, policy) if signals or constraints or policy else None


def _require_optimizer(inner: Any) -> None:
    """`MultiSteps` is one, though no `GradientTransformation`; a class that makes them is not."""
    has_both = callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))
    if not has_both or isinstance(inner, type):
        raise ValueError(f"inner must be an Optax optimizer or None, got {inner!r}.")


def _holds(x: Any, condition: Callable[[Any], Any]) -> bool:
    """Whether x is a number of which the condition is true; a traced one is not looked at."""
    if isinstance(x, jax.core.Tracer):
        return True
    return np.ndim(x) == 0 and np.issubdtype(np.asarray(x).dtype, np.number) and bool(condition(x))

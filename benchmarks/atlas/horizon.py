r"""A law under study: overshoot over half of the run, under a ceiling that rises with its age.

The guard's law asks whether the last step went too far. This one asks whether the way from the
run's own recent mean was worth going. With g the gradient, p the parameters and t the step,

.. math::
  \bar p_t &= \bar p_{t-1} + (p_t - \bar p_{t-1}) / \max(4, t / 2) \\
  c_t &= \cos(g_t,\ p_t - \bar p_{t-1}) \\
  a_t &= \mathrm{clip}(m_t / \sigma_t - 1,\ -1,\ 1) \\
  \log s_t &= \log s_{t-1} - a_t \min(0.4,\ (2 \text{ if } a_t < 0 \text{ else } 3) / t) \\
  r_t &\le 0.0015 \sqrt{t}

m is the mean of c over about the last eighth of the run, and σ the spread of one c about it, by the
differences of neighbours. While c is negative the loss still falls along the way, and longer steps
would have been better; above zero the mean is better than where the run stands, as it is where
steps swing across a valley. Until the first alarm log s may grow by 0.4 a step. The horizon grows
with the run, so that nothing in it is a number of steps. The relative step r counts each leaf's
update √(min(rows, columns) / 96) times, rows and columns of its most balanced shape as a matrix, at
least 27: a tuned step goes as 1/√width. There is no loss in the law, so its unit
does not matter.

Not here yet: skips, the budget, what is reported, and all that the guard does beside the scale.
Results are in docs/research.md (attempt 31).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lbw_optax.law import telemetry

HORIZON, MEMORY = 2, 8  # the shares of the run behind the mean and behind m: a half, an eighth
LEAST = 4  # the same in steps, at least
SET_POINT = 1.0  # the m / σ that is held
GROWTH, CUT = 2.0, 3.0  # of log(scale), over the step
MOST = 0.4  # in one step; until the first alarm growth is as quick as that, under the ceiling
FIRST_ALARM, NOT_BEFORE = 0.25, 4  # the alarm that ends quick growth, and in which step at first
CEILING = 0.0015  # of the relative step, times √t
FULL, TRUST = 0.9, 2.0  # from this scale on, so many σ more are no reason to cut
FIRST_STEP, SMALLEST = 0.001, 0.001  # relative step of the first one; least scale
WIDTH, FEWEST = 96.0, 27  # of the reference matrix; least side that counts


class Horizon(NamedTuple):
    """What the law remembers: a probe of the parameters, and float32 scalars."""

    inner_state: Any
    steps: jax.Array
    log_scale: jax.Array
    mean_parameters: jax.Array  # float32[n], on the probe
    overshoot: jax.Array  # c of the last step
    mean: jax.Array  # m
    variance: jax.Array  # σ²
    started: jax.Array  # bool
    settled: jax.Array  # bool, an alarm has been raised


def horizon_guard(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Scale the updates of `inner` by the law above."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Horizon:
        zero, no = jnp.float32(0), jnp.array(False)
        probe = telemetry.sample(params)
        return Horizon(inner.init(params), zero, zero, probe, zero, zero, zero, no, no)

    def update_fn(grads: Any, state: Horizon, params: Any = None, **extra: Any) -> Any:
        state, alarm = _observe(state, telemetry.sample(grads), telemetry.sample(params))
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        state = _decide(state._replace(inner_state=inner_state), alarm, _step(updates, params))
        scale = jnp.exp(state.log_scale)
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _observe(state: Horizon, gradient: jax.Array, here: jax.Array) -> tuple[Horizon, jax.Array]:
    way = here - state.mean_parameters
    product = jnp.linalg.norm(gradient) * jnp.linalg.norm(way)
    known = product > 0
    overshoot = jnp.where(known, gradient @ way / jnp.where(known, product, 1.0), 0.0)
    steps = state.steps + 1
    memory = jnp.minimum(jnp.maximum(steps / MEMORY, LEAST), jnp.maximum(steps - 1, 1))
    share = jnp.where(known, 1 / memory, 0.0)
    mean = state.mean + share * (overshoot - state.mean)
    change = 0.5 * jnp.square(overshoot - state.overshoot) - state.variance
    variance = state.variance + jnp.where(steps < 3, 0.0, share) * change
    std = jnp.sqrt(variance + 1e-10)
    excess = mean / std - SET_POINT
    trusted = state.log_scale >= math.log(FULL)
    excess = excess - jnp.where(trusted, jnp.clip(excess, 0.0, TRUST), 0.0)
    horizon = jnp.minimum(jnp.maximum(steps / HORIZON, LEAST), steps)
    state = state._replace(
        steps=steps,
        mean_parameters=state.mean_parameters + way / horizon,
        overshoot=overshoot,
        mean=mean,
        variance=variance,
    )
    return state, jnp.where(known, jnp.clip(excess, -1.0, 1.0), 0.0)


def _decide(state: Horizon, alarm: jax.Array, step: jax.Array) -> Horizon:
    most = jnp.minimum(jnp.where(alarm < 0, GROWTH, CUT) / state.steps, MOST)
    most = jnp.where((alarm < 0) & ~state.settled, MOST, most)
    log_step = jnp.log(step + 1e-30)
    first = math.log(FIRST_STEP) - log_step
    log_scale = jnp.where(state.started, state.log_scale - most * alarm, first)
    ceiling = math.log(CEILING) + 0.5 * jnp.log(state.steps) - log_step
    log_scale = jnp.clip(jnp.minimum(log_scale, ceiling), math.log(SMALLEST), 0.0)
    alarmed = state.started & (state.steps >= NOT_BEFORE) & (alarm > FIRST_ALARM)
    return state._replace(
        log_scale=log_scale,
        started=state.started | (step > 0),
        settled=state.settled | alarmed,
    )


def _step(updates: Any, params: Any) -> jax.Array:
    """The relative step r of the updates as they are."""
    squares = [
        _side(leaf.shape) / WIDTH * jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        for leaf in jax.tree.leaves(updates)
    ]
    return jnp.sqrt(sum(squares, jnp.float32(0))) / (optax.tree.norm(params) + 1e-30)


def _side(shape: tuple[int, ...]) -> float:
    """The smaller side of the most balanced matrix of these axes in their order."""
    if len(shape) < 2:
        return 1.0
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return float(max(FEWEST, max(min(split) for split in splits)))

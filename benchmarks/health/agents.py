"""Agents: the loss is a surrogate, or its target moves, so that its value says little."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.health.task import Now, Params, Task, at, mlp, mlp_start, task


def tasks() -> dict[str, Task]:
    return {
        "reinforce": _reinforce(),
        "grpo": _grpo(0.04),
        "grpo-strong-kl": _grpo(0.2),
        "q-learning": _q_learning("Q-learning, a target network replaced every 50 steps", _hard),
        "q-learning-soft": _q_learning("Q-learning, a target network that follows", _soft),
    }


def _reinforce() -> Task:
    """A contextual bandit of five arms; the loss is a surrogate around 0."""
    values = np.random.default_rng(6).normal(size=(8, 5)).astype(np.float32)

    def loss(layers: Params, now: Now) -> jax.Array:
        seen, choice, noise = jax.random.split(now.key, 3)
        x = jax.random.normal(seen, (64, 8))
        logits = mlp(layers, x, jnp.tanh)
        arm = jax.random.categorical(choice, logits)[:, None]
        reward = _pick(jnp.tanh(x @ values), arm) + 0.3 * jax.random.normal(noise, (64,))
        return -jnp.mean((reward - reward.mean()) * _pick(jax.nn.log_softmax(logits), arm))

    def metric(layers: Params) -> jax.Array:
        x = jax.random.normal(jax.random.key(98), (2000, 8))
        policy = jax.nn.softmax(mlp(layers, x, jnp.tanh))
        return jnp.mean(jnp.sum(policy * jnp.tanh(x @ values), axis=1))

    return task(
        "REINFORCE on a contextual bandit",
        lambda key: mlp_start(key, 8, 32, 5),
        loss,
        metric,
        rate=0.01,
        unit="reward",
        higher=True,
    )


def _grpo(beta: float) -> Task:
    """64 prompts of 16 answers each, of which one is right; groups of 8, and beta times a KL.

    The advantages of a group have mean 0, so that the loss is 0 at first and then beta times the
    divergence from the reference, which training makes grow.
    """
    rng = np.random.default_rng(4)
    reference = (0.5 * rng.normal(size=(64, 16))).astype(np.float32)
    right = rng.integers(16, size=64)

    def loss(p: Params, now: Now) -> jax.Array:
        rows, choice = jax.random.split(now.key)
        prompts = jax.random.randint(rows, (16,), 0, 64)
        logp = jax.nn.log_softmax(p["w"] @ p["v"])[prompts]
        answers = jax.random.categorical(choice, logp[:, None], shape=(16, 8))
        reward = (answers == at(right, prompts)[:, None]).astype(jnp.float32)
        spread = reward.std(1, keepdims=True) + 1e-4
        advantage = (reward - reward.mean(1, keepdims=True)) / spread
        own = jnp.take_along_axis(logp, answers, 1)
        gap = jnp.take_along_axis(jax.nn.log_softmax(reference)[prompts], answers, 1) - own
        ratio = jnp.exp(own - jax.lax.stop_gradient(own))
        return jnp.mean(-ratio * advantage + beta * (jnp.exp(gap) - gap - 1))

    def metric(p: Params) -> jax.Array:
        return _pick(jax.nn.softmax(p["w"] @ p["v"]), right[:, None]).mean()

    return task(
        f"GRPO, KL weight {beta:g}: the loss starts at 0 and rises",
        lambda key: {"w": jnp.eye(64) + 0.01 * jax.random.normal(key, (64, 64)), "v": reference},
        loss,
        metric,
        rate=0.01,
        optimizer=optax.adamw,
        unit="reward",
        higher=True,
    )


PLACES, DISCOUNT = 20, 0.9


def _q_learning(title: str, remember: Callable[[Params, Params, jax.Array], Params]) -> Task:
    """Fitted Q on a chain: the error of a step grows with the values, from 0 to 10."""
    eye, exact = np.eye(PLACES, dtype=np.float32), best_values()

    def loss(layers: Params, now: Now) -> jax.Array:
        where, choice, noise = jax.random.split(now.key, 3)
        place = jax.random.randint(where, (64,), 0, PLACES)
        move = jax.random.randint(choice, (64,), 0, 2)
        after = jnp.clip(place + 2 * move - 1, 0, PLACES - 1)
        reward = (after == PLACES - 1) + 0.2 * jax.random.normal(noise, (64,))
        target = reward + DISCOUNT * mlp(now.memory, at(eye, after)).max(1)
        return jnp.mean((_pick(mlp(layers, at(eye, place)), move[:, None]) - target) ** 2)

    def metric(layers: Params) -> jax.Array:
        return jnp.sqrt(jnp.mean((mlp(layers, jnp.asarray(eye)) - exact) ** 2))

    return task(
        title,
        lambda key: mlp_start(key, PLACES, 64, 2),
        loss,
        metric,
        rate=1e-3,
        steps=2000,
        remember=remember,
        unit="error of the values",
    )


def _hard(memory: Params, model: Params, step: jax.Array) -> Params:
    return jax.tree.map(lambda old, new: jnp.where(step % 50 == 0, new, old), memory, model)


def _soft(memory: Params, model: Params, step: jax.Array) -> Params:
    return jax.tree.map(lambda old, new: old + 0.02 * (new - old), memory, model)


def best_values() -> np.ndarray:
    """Those of the best policy, by iteration."""
    q = np.zeros((PLACES, 2))
    after = np.clip(np.arange(PLACES)[:, None] + np.array([[-1, 1]]), 0, PLACES - 1)
    for _ in range(1000):
        q = (after == PLACES - 1) + DISCOUNT * q.max(1)[after]
    return q.astype(np.float32)


def _pick(values: jax.Array, index: jax.Array | np.ndarray) -> jax.Array:
    return jnp.take_along_axis(values, jnp.asarray(index), 1)[:, 0]

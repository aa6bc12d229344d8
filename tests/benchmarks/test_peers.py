"""Each peer against a second implementation: NumPy, float64, written from the formula."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import peers
from benchmarks.peers import history

LR = 0.01


class Trajectory(NamedTuple):
    """Gradients of a matrix and a vector over time, and a loss; with a spike in the middle."""

    w: np.ndarray
    b: np.ndarray
    losses: np.ndarray

    @property
    def steps(self):
        return len(self.losses)

    @property
    def norms(self):
        return np.sqrt((self.w**2).sum((1, 2)) + (self.b**2).sum(1))


def trajectory(steps, seed, spike=80.0):
    random = np.random.default_rng(seed)
    w, b = random.normal(size=(steps, 3, 4)), 0.3 * random.normal(size=(steps, 5))
    at = 2 * steps // 3
    w[at] *= spike
    b[at + 2, 1] *= 10 * spike
    losses = 4 + 0.1 * random.normal(size=steps)
    losses[at + 4] = 40
    return Trajectory(0.2 * w, 0.2 * b, losses)


def run(tx, run_):
    """The updates of every step, from one scan in float32."""
    params = {"w": jnp.ones((3, 4)), "b": jnp.full(5, -2.0)}
    tx = optax.with_extra_args_support(tx)

    def step(carry, batch):
        params, state = carry
        w, b, loss = batch
        updates, state = tx.update({"w": w, "b": b}, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), updates

    batches = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tuple(run_))
    _, updates = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), batches))()
    return updates


def agree(updates, reference):
    for name in ("w", "b"):
        np.testing.assert_allclose(updates[name], reference[name], rtol=2e-4, atol=1e-6)


SHORT = trajectory(30, seed=1)
LONG = trajectory(240, seed=2)


@pytest.mark.parametrize(
    ("run_", "constants"),
    [(SHORT, {"warmup_steps": 6, "max_norm": 1e9}), (SHORT, {"warmup_steps": 6}), (LONG, {})],
)
def test_zclip(run_, constants):
    alpha, threshold, eps = 0.97, 2.5, 1e-6
    warmup, cap = constants.get("warmup_steps", 25), constants.get("max_norm", 1.0)
    mean, var = run_.norms[:warmup].mean(), run_.norms[:warmup].var()
    targets = run_.norms.copy()
    for i in range(warmup, run_.steps):
        z = (targets[i] - mean) / (var**0.5 + eps)
        if z > threshold:
            targets[i] = mean + (threshold**2 / z) * var**0.5
        mean = alpha * mean + (1 - alpha) * targets[i]
        var = alpha * var + (1 - alpha) * (targets[i] - mean) ** 2
    assert (targets < run_.norms).sum() >= 2
    factors = np.minimum(1, np.minimum(targets, cap) / run_.norms)
    reference = {"w": run_.w * factors[:, None, None], "b": run_.b * factors[:, None]}
    agree(run(peers.zclip(**constants), run_), reference)


@pytest.mark.parametrize(("run_", "constants"), [(SHORT, {"warmup_steps": 6}), (LONG, {})])
def test_adagc(run_, constants):
    ratio, decay, warmup = 1.04, 0.99, constants.get("warmup_steps", 100)
    reference = {}
    for name in ("w", "b"):
        gradients, out, gamma = getattr(run_, name), [], np.inf
        for i, g in enumerate(gradients):
            if i < warmup:
                g = g * min(1, 1.0 / run_.norms[i])
                gamma = min(gamma, np.sqrt((g**2).sum()))
            else:
                norm = np.sqrt((g**2).sum())
                g = g * min(1, ratio * gamma / norm)
                gamma = decay * gamma + (1 - decay) * min(norm, ratio * gamma)
            out.append(g)
        reference[name] = np.stack(out)
        clipped = np.abs(reference[name] - gradients).reshape(run_.steps, -1).max(1) > 1e-3
        assert clipped[warmup:].any()
    agree(run(peers.adagc(**constants), run_), reference)


def test_adagc_is_not_frozen_by_a_zero_gradient():
    zero_first = SHORT._replace(w=np.concatenate([np.zeros((1, 3, 4)), SHORT.w[1:]]))
    updates = run(peers.adagc(warmup_steps=6), zero_first)
    assert np.abs(updates["w"][6:]).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.parametrize(
    ("run_", "constants"),
    [
        (SHORT, {"threshold": 20.0, "reset_every": 12, "warmup_steps": 5, "grace_steps": 3}),
        (LONG, {"reset_every": 110}),
        (LONG, {"threshold": 50.0}),
    ],
)
def test_spam(run_, constants):
    c = {"threshold": 5000.0, "reset_every": 500, "warmup_steps": 150, "grace_steps": 20}
    c |= constants
    b1, b2, eps = 0.9, 0.999, 1e-6
    reference, clipped = {}, 0
    for name in ("w", "b"):
        out, m, v = [], 0.0, np.zeros_like(getattr(run_, name)[0])
        for t, g in enumerate(getattr(run_, name), start=1):
            phase = t % c["reset_every"]
            if phase == 0:
                m, v = 0 * m, 0 * v
            if t >= c["grace_steps"] and phase >= c["grace_steps"]:
                spikes = g**2 > c["threshold"] * v
                clipped += spikes.sum()
                g = np.where(spikes, np.sign(g) * np.sqrt(c["threshold"] * v), g)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            scale = 1.0
            if t >= c["reset_every"] and phase < c["warmup_steps"]:
                scale -= 0.99 * (1 + np.cos(np.pi * phase / (c["warmup_steps"] + 1))) / 2
            correction = np.sqrt(1 - b2**t) / (1 - b1**t)
            out.append(-LR * scale * correction * m / (np.sqrt(v) + eps))
        reference[name] = np.stack(out)
    assert clipped >= 1
    agree(run(optax.chain(peers.scale_by_spam(**constants), optax.scale(-LR)), run_), reference)


@pytest.mark.parametrize(("run_", "constants"), [(SHORT, {"reset_every": 12}), (LONG, {})])
def test_stable_spam(run_, constants):
    reset = constants.get("reset_every", 1000)
    b1, b2, eps, gamma1, gamma2, gamma3 = 0.9, 0.999, 1e-8, 0.7, 0.9, 0.999
    silent = run_._replace(w=np.where(np.arange(run_.steps)[:, None, None] == 4, 0.0, run_.w))
    reference = {}
    for name in ("w", "b"):
        out, m, v, peak, n, q, since = [], 0.0, 0.0, 0.0, 0.0, 0.0, 0
        for t, g in enumerate(getattr(silent, name), start=1):
            since += 1
            if t % reset == 0:
                m, v, since = 0.0, 0.0, 1
            highest = np.abs(g).max()
            peak = gamma3 * peak + (1 - gamma3) * highest
            limit = peak / (1 - gamma3**t)
            g = np.where(np.abs(g) > limit, g / max(highest, 1e-30) * limit, g)
            norm = np.sqrt((g**2).sum())
            if norm == 0:
                out.append(0 * g)
                continue
            n, q = gamma1 * n + (1 - gamma1) * norm, gamma2 * q + (1 - gamma2) * norm**2
            g = g / norm * (n / (1 - gamma1**t)) / (np.sqrt(q / (1 - gamma2**t)) + eps)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            m_hat, v_hat = m / (1 - b1**since), v / (1 - b2**since)
            out.append(-LR * m_hat / (np.sqrt(v_hat) + eps))
        reference[name] = np.stack(out)
    tx = optax.chain(peers.scale_by_stable_spam(**constants), optax.scale(-LR))
    agree(run(tx, silent), reference)


@pytest.mark.parametrize(("b1", "b2", "decay"), [(0.9, 0.99, 0.01), (0.9, 0.95, 0.1)])
def test_stable_adamw(b1, b2, decay):
    eps, reference, shortened = 1e-6, {}, 0
    for name, start in (("w", 1.0), ("b", -2.0)):
        out, m, v, p = [], 0.0, 0.0, np.full_like(getattr(SHORT, name)[0], start)
        for t, g in enumerate(getattr(SHORT, name), start=1):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            rms = np.sqrt(np.mean(g**2 / np.maximum(v_hat, eps**2)))
            shortened += rms > 1.5
            out.append(-LR / max(1, rms) * (m_hat / (np.sqrt(v_hat) + eps) + decay * p))
            p = p + out[-1]
        reference[name] = np.stack(out)
    assert shortened >= 2
    agree(run(peers.stable_adamw(LR, b1, b2, eps, decay), SHORT), reference)


def limits(values, window, sigmas):
    """Mean + sigmas · std of up to `window` values before each; infinite for the first half."""
    out = []
    for i in range(len(values)):
        past = values[max(0, i - window) : i]
        enough = i >= window // 2
        out.append(past.mean() + sigmas * max(past.std(), 1e-6) if enough else np.inf)
    return np.array(out)


@pytest.mark.parametrize(
    ("run_", "constants"), [(SHORT, {"window": 16, "sigmas": 4.0}), (LONG, {})]
)
def test_skip_step(run_, constants):
    window, sigmas = constants.get("window", 128), constants.get("sigmas", 6.0)
    skipped = run_.losses > limits(run_.losses, window, sigmas)
    skipped |= run_.norms > limits(run_.norms, window, sigmas)
    assert 2 <= skipped.sum() < 6
    reference = {}
    for name in ("w", "b"):
        out, trace = [], 0.0
        for g, skip in zip(getattr(run_, name), skipped, strict=True):
            trace = trace if skip else 0.9 * trace + g
            out.append(0 * g if skip else -LR * trace)
        reference[name] = np.stack(out)
    agree(run(peers.skip_step(optax.sgd(LR, momentum=0.9), **constants), run_), reference)


SKIPPING = {"maxtext": (peers.maxtext_skip, 1, 0, 1), "levanter": (peers.levanter_skip, 0, 1e-6, 0)}


def skipped_by(rule, values, window, sigmas):
    """Which steps the rule leaves out for one signal; not-a-number exceeds every limit."""
    _, lost, least, sooner = SKIPPING[rule]
    out = []
    for i, x in enumerate(values):
        past = values[max(0, i - window) : i]
        early = i + sooner < max(2, window // 2)
        with np.errstate(invalid="ignore"):
            limit = np.inf if early else past.mean() + sigmas * max(past.std(ddof=lost), least)
            out.append(not early and not x <= limit)
    return np.array(out)


@pytest.mark.parametrize("rule", SKIPPING)
@pytest.mark.parametrize("bad", [None, "nan_loss", "early_nan_loss", "constant"])
@pytest.mark.parametrize(
    ("run_", "constants"), [(SHORT, {"window": 16, "sigmas": 4.0}), (LONG, {})]
)
def test_skip_rules_of_frameworks(run_, constants, bad, rule):
    window, sigmas = constants.get("window", 128), constants.get("sigmas", 6.0)
    losses = run_.losses.astype(np.float32)
    if bad == "constant":
        losses[:] = 4
    elif bad is not None:
        losses[run_.steps // 2 if bad == "nan_loss" else 1] = np.nan
    run_ = run_._replace(losses=losses)
    skipped = skipped_by(rule, losses.astype(float), window, sigmas)
    skipped |= skipped_by(rule, run_.norms, window, sigmas)
    # One NaN: everything until it has left the window.
    lasting = bad in ("nan_loss", "early_nan_loss")
    assert (skipped.sum() > window // 3) if lasting else (1 <= skipped.sum() < 6)
    reference = {}
    for name in ("w", "b"):
        out, trace = [], 0.0
        for g, skip in zip(getattr(run_, name), skipped, strict=True):
            trace = trace if skip else 0.9 * trace + g
            out.append(0 * g if skip else -LR * trace)
        reference[name] = np.stack(out)
    make = SKIPPING[rule][0]
    agree(run(make(optax.sgd(LR, momentum=0.9), **constants), run_), reference)


@pytest.mark.parametrize("rule", SKIPPING)
def test_what_skip_rules_do_with_a_nan_gradient(rule):
    """MaxText selects, Levanter multiplies by zero; before the window is half full neither acts."""
    w = SHORT.w.copy()
    w[20, 0, 0] = np.nan
    updates = run(SKIPPING[rule][0](optax.sgd(LR), 16), SHORT._replace(w=w))
    assert np.isnan(updates["w"][20]).any() == (rule == "levanter")
    assert not np.isnan(updates["w"][:20]).any()
    w[3, 0, 0] = np.nan
    assert np.isnan(run(SKIPPING[rule][0](optax.sgd(LR), 16), SHORT._replace(w=w))["w"][3]).any()


@pytest.mark.parametrize(("run_", "constants"), [(SHORT, {"window": 16}), (LONG, {})])
def test_clip_by_update_history(run_, constants):
    highest = limits(run_.norms, constants.get("window", 128), 3.0)
    factors = np.minimum(1, highest / run_.norms)
    assert (factors < 1).sum() >= 1
    reference = {"w": run_.w * factors[:, None, None], "b": run_.b * factors[:, None]}
    agree(run(peers.clip_by_update_history(**constants), run_), reference)


def test_history_leaves_out_what_is_not_a_number():
    past = history.empty(4)
    for value in (1.0, jnp.nan, 3.0):
        past = history.push(past, jnp.asarray(value))
    assert float(history.limit(past, 2.0)) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "make",
    [
        peers.zclip,
        peers.adagc,
        peers.scale_by_spam,
        peers.scale_by_stable_spam,
        lambda: peers.stable_adamw(LR),
        lambda: peers.skip_step(optax.adam(LR)),
        lambda: peers.maxtext_skip(optax.adam(LR)),
        lambda: peers.levanter_skip(optax.adam(LR)),
        peers.clip_by_update_history,
    ],
)
def test_state_keeps_its_types_and_updates_theirs(make):
    tx = optax.with_extra_args_support(make())
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(3)}
    before = tx.init(params)
    updates, after = tx.update(params, before, params, value=jnp.asarray(1.0))
    assert jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, after)
    assert updates["w"].dtype == jnp.bfloat16
    assert updates["b"].dtype == jnp.float32

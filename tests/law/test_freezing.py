"""Layers frozen at run time: the decision against NumPy, then whole guarded runs."""

import functools
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_same_bits, guard_in, slowly, types

import lbw_optax
from lbw_optax import by_layer, lbw_guard
from lbw_optax.law import freezing
from lbw_optax.law.control import Action, Decision
from lbw_optax.law.freezing import Limits
from lbw_optax.names import decoded

GROUPS = 8
STACKED = functools.partial(by_layer, stacked="layers")


# --- The decision ---


class Average:
    """A winsorised exponential mean of each group, in float64."""

    def __init__(self):
        self.mean, self.variance, self.weight = (np.zeros(GROUPS) for _ in range(3))

    def limit(self):
        std = np.sqrt(self.variance + 0.1**2 + (1 - self.weight))
        return np.maximum(6 * std, math.log(10))

    def excess(self, y, measured):
        return np.where(measured & (self.weight > 0), (y - self.mean) / self.limit(), 0.0)

    def take(self, y, measured):
        for g in np.flatnonzero(measured):
            std = math.sqrt(self.variance[g] + 0.1**2 + 1 - self.weight[g])
            bound = 3 * std if self.weight[g] > 0 else 1e18
            self.weight[g] = 0.95 * self.weight[g] + 0.05
            rate = 0.05 / self.weight[g]
            d = float(np.clip(y[g] - self.mean[g], -bound, bound))
            self.mean[g] += rate * d
            self.variance[g] = (1 - rate) * (self.variance[g] + rate * d * d)


class Reference:
    """The whole of `law.freezing`, group by group."""

    def __init__(self, limits):
        self.limits, self.most = limits, int(limits.max_frozen * GROUPS + 1e-4)
        self.gradient, self.step = Average(), Average()
        self.gradient_jump, self.step_jump = (np.full(GROUPS, -100.0) for _ in range(2))
        self.frozen = np.zeros(GROUPS, bool)
        self.since, self.quiet, self.cool_down = (np.zeros(GROUPS, int) for _ in range(3))
        self.log_scale = np.zeros(GROUPS)

    def run(self, squares, rest, updates, params):
        finite = np.isfinite(squares)
        measured = finite & (squares > 0)
        y = 0.5 * np.log(np.where(measured, squares, 1.0))
        excess = self.gradient.excess(y, measured)
        was, since = self.frozen.copy(), self.since.copy()
        free = np.where(was, since < self.limits.max_steps, self.cool_down == 0)
        broken = set(np.flatnonzero(~finite))
        saved = broken and all(free[list(broken)]) and len(broken) <= self.most
        saved = broken if saved and math.isfinite(rest) else set()
        alone = self.alone(excess, measured & ~was)
        self.quiet = np.where(was & finite & (excess <= 0.5), self.quiet + 1, 0)
        staying = [
            g
            for g in range(GROUPS)
            if was[g] and since[g] < self.limits.max_steps and self.quiet[g] < 3
        ]
        out = self.is_news(excess, y, self.gradient_jump)
        new = [g for g in range(GROUPS) if free[g] and not was[g] and out[g] and alone[g]]
        order = [
            *sorted(saved, key=lambda g: (g not in staying, -excess[g], g)),
            *[g for g in staying if g not in saved],
            *sorted((g for g in new if g not in saved), key=lambda g: (-excess[g], g)),
        ]
        self.gradient.take(y, measured)
        self.turn(order[: self.most], since)
        self.by_step(squares, updates, params)
        return self.frozen.copy()

    def turn(self, chosen, since):
        for g in range(GROUPS):
            was, now = self.frozen[g], g in chosen
            self.cool_down[g] = since[g] if was and not now else max(self.cool_down[g] - 1, 0)
            if was and not now:
                self.log_scale[g] = math.log(0.1)
            elif not now:
                self.log_scale[g] = min(self.log_scale[g] + 0.24, 0.0)
            self.since[g] = since[g] + 1 if was == now else 1
            self.quiet[g] = self.quiet[g] if now else 0
            self.frozen[g] = now

    def by_step(self, squares, updates, params):
        measured = ~self.frozen & np.isfinite(updates) & (updates > 0) & (params > 0)
        measured &= squares != 0
        y = 0.5 * np.log(np.where(measured, updates / np.where(params > 0, params, 1), 1.0))
        excess = self.step.excess(y + self.log_scale, measured)
        alone = self.alone(excess, measured)
        out = self.is_news(excess, y + self.log_scale, self.step_jump)
        new = [g for g in range(GROUPS) if out[g] and alone[g] and self.cool_down[g] == 0]
        self.step.take(y, measured)
        for g in sorted(new, key=lambda g: (-excess[g], g))[: self.most - self.frozen.sum()]:
            self.frozen[g], self.since[g] = True, 1

    @staticmethod
    def is_news(excess, y, jump):
        news = (excess > 1) & (y > jump + math.log(10))
        jump[excess > 1] = np.maximum(jump, y)[excess > 1]
        return news

    @staticmethod
    def alone(excess, counts):
        moved = sum(counts[g] and excess[g] > 1 / 3 for g in range(GROUPS))
        return [2 * moved < sum(counts)] * GROUPS


def telemetry(seed, steps=300):
    """Squares of gradients, of leaves in no group, of updates and parameters, with all that may
    become of them: float32[steps, G] each."""
    rng = np.random.default_rng([seed, 19])
    level = 10.0 ** rng.uniform(-3, 3, GROUPS)
    noise = rng.normal(size=(2, steps, GROUPS))
    gradients, updates = (level * np.exp(0.4 * x) for x in noise)
    params, rest = np.ones([steps, GROUPS]), np.ones(steps)
    for _ in range(24):
        at, group = rng.integers(5, steps - 60), rng.integers(GROUPS, size=rng.integers(1, 4))
        length, factor = rng.choice([1, 5, 60]), 10.0 ** rng.uniform(1, 12)
        match rng.integers(7):
            case 0:
                gradients[at : at + length, group] = rng.choice([np.nan, np.inf])
            case 1:
                gradients[at : at + length, group] *= factor
            case 2:
                gradients[at : at + length] *= factor
            case 3:
                updates[at : at + length, group] *= factor
            case 4:
                updates[at : at + length] *= factor
            case 5:
                gradients[at : at + length, group] = 0
            case 6:
                rest[at] = np.nan
    return tuple(np.asarray(x, np.float32) for x in (gradients, rest, updates, params))


@functools.cache
def decided(seed, limits):
    """The states after each step, as the law has them."""

    def step(state, given):
        gradients, rest, updates, params = given
        state = freezing.arrive(state, gradients, rest, limits)
        state = freezing.propose(state, gradients, updates, params, jnp.array(False), limits)
        return state, state

    first = freezing.init([str(i) for i in range(GROUPS)])
    _, states = jax.jit(lambda given: jax.lax.scan(step, first, given))(telemetry(seed))
    return jax.device_get(states)


@pytest.mark.parametrize("limits", [Limits(0.25, 50), Limits(0.5, 4), Limits(0.99, 20)])
@pytest.mark.parametrize("seed", range(4))
def test_the_decision_is_that_of_numpy(seed, limits):
    reference, states = Reference(limits), decided(seed, limits)
    for t, (squares, rest, updates, params) in enumerate(zip(*telemetry(seed), strict=True)):
        wide = (np.float64(x) for x in (squares, rest, updates, params))
        assert reference.run(*wide).tolist() == states.frozen[t].tolist(), t
        for name in ("since", "cool_down", "quiet"):
            assert getattr(reference, name).tolist() == getattr(states, name)[t].tolist(), (t, name)
    np.testing.assert_allclose(states.log_thaw[-1], reference.log_scale, atol=1e-5)
    np.testing.assert_allclose(states.gradient_length.mean[-1], reference.gradient.mean, atol=1e-3)
    assert states.frozen.any()


@pytest.mark.parametrize("limits", [Limits(0.25, 50), Limits(0.5, 4), Limits(0.99, 20)])
@pytest.mark.parametrize("seed", range(4, 10))
def test_what_is_promised_of_any_run(seed, limits):
    states = decided(seed, limits)
    frozen = states.frozen
    assert frozen.sum(1).max() <= int(limits.max_frozen * GROUPS + 1e-4) < GROUPS
    for group in frozen.T:
        turns = np.flatnonzero(np.diff(group.astype(int), prepend=0, append=0))
        begins, ends = turns[::2], turns[1::2]
        assert (ends - begins <= limits.max_steps).all()
        assert (begins[1:] - ends[:-1] >= (ends - begins)[:-1]).all()  # cool-down
    thaws = frozen[:-1] & ~frozen[1:]
    np.testing.assert_allclose(states.log_thaw[1:][thaws], math.log(0.1), rtol=1e-6)
    for memory in (states.gradient_length, states.step_length):
        assert all(np.isfinite(x).all() for x in memory)


@pytest.mark.parametrize(
    ("struck", "is_frozen"), [([2], True), ([2, 5], True), ([2, 5, 6], False), (range(8), False)]
)
def test_what_is_not_finite_is_frozen_in_the_first_step_already(struck, is_frozen):
    """And not where it is in more groups than may be: that step is skipped."""
    squares = np.ones(GROUPS, np.float32)
    squares[list(struck)] = np.nan
    state = freezing.init([str(i) for i in range(GROUPS)])
    found = freezing.arrive(state, squares, jnp.float32(1), Limits(0.25, 50))
    assert np.flatnonzero(found.frozen).tolist() == (list(struck) if is_frozen else [])


@pytest.mark.parametrize("struck", [4, 8])
def test_a_jump_of_half_of_the_groups_is_not_a_layers(struck):
    gradients = np.ones([60, GROUPS], np.float32)
    gradients[50:, :struck] = 1e8
    state = freezing.init([str(i) for i in range(GROUPS)])
    for squares in gradients:
        state = freezing.arrive(state, squares, jnp.float32(1), Limits(0.25, 50))
        assert not state.frozen.any()


def test_a_lasting_shift_of_a_layers_level_is_accepted():
    """Within 25 steps, the gradient a million times as long from then on."""
    gradients = np.ones([90, GROUPS], np.float32)
    gradients[40:, 3] = 1e12
    state, frozen = freezing.init([str(i) for i in range(GROUPS)]), []
    for squares in gradients:
        state = freezing.arrive(state, squares, jnp.float32(1), Limits(0.25, 50))
        frozen.append(np.flatnonzero(state.frozen).tolist())
    assert frozen[:40] == [[]] * 40
    assert frozen[40] == [3]
    assert frozen[65:] == [[]] * 25


@pytest.mark.parametrize(
    ("optimizer", "gap", "background", "most"),
    [
        (optax.adamw(1e-3), 50, 0.0, 0),
        (optax.adamw(1e-3, weight_decay=0.1), 200, 0.0, 0),
        (optax.sgd(1e-2, momentum=0.9), 200, 0.0, 0),
        (optax.adamw(1e-3), 50, 1e-3, 2),
        (optax.sgd(1e-2), 30, 0.03, 2),
    ],
)
def test_what_is_seldom_trained_is_not_kept_from_it(optimizer, gap, background, most):
    """An expert that is asked in few steps, or an embedding of rare tokens: without a gradient in
    between it is never frozen, and with a small one for one gradient and for one step."""
    rng, steps = np.random.default_rng(3), 600
    given = rng.normal(size=(steps, GROUPS, 16)) * np.exp(0.3 * rng.normal(size=(steps, GROUPS, 1)))
    given[:, 3] *= np.where(rng.random(steps) < 1 / gap, 1.0, background)[:, None]
    limits, params = Limits(0.25, 50), jnp.ones((GROUPS, 16))

    def step(carry, gradients):
        params, inner, state = carry
        squares = jnp.sum(gradients**2, -1)
        state = freezing.arrive(state, squares, jnp.float32(1), limits)
        updates, inner = optimizer.update(gradients, inner, params)
        lengths = (jnp.sum(x**2, -1) for x in (updates, params))
        state = freezing.propose(state, squares, *lengths, jnp.array(False), limits)
        return (params + updates, inner, state), state.frozen

    first = (params, optimizer.init(params), freezing.init([str(i) for i in range(GROUPS)]))
    _, frozen = jax.jit(lambda given: jax.lax.scan(step, first, given))(jnp.float32(given))
    freezes = np.sum(np.diff(np.asarray(frozen, int), axis=0, prepend=0) > 0, 0)
    assert 0 <= freezes[3] <= most
    assert freezes.sum() == freezes[3]


# --- Guarded runs ---

LAYERS, STRUCK = 4, 3
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.01),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
    "partition": lambda: optax.partition(
        {"matrix": optax.adamw(0.01), "vector": optax.sgd(0.01, momentum=0.9)},
        lambda params: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params),
    ),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.01), 2),
}


def model(*seed):
    rng = np.random.default_rng([*seed, 7])

    def layer():
        return {"kernel": rng.normal(size=(5, 4)).astype("f"), "bias": np.ones(4, "f")}

    return {
        "embed": rng.normal(size=(9, 5)).astype("f"),
        "layers": [layer() for _ in range(LAYERS)],
    }


def gradients_at(step, bad=(), factor=np.nan, seed=0):
    """Of a sound run, but that in these steps those of one layer are multiplied."""
    found = model(seed, step)
    if step in bad:
        found["layers"][STRUCK]["kernel"][2, 1] *= factor
    return found


def stack(tree):
    """The layers stacked along a first axis, as for a scan over them."""
    return {**tree, "layers": jax.tree.map(lambda *x: np.stack(x), *tree["layers"])}


def stack_trees(trees):
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *trees)


@functools.cache
def stepping(optimizer="adamw", groups=by_layer, **knobs):
    tx = lbw_guard(OPTIMIZERS[optimizer](), groups=groups, **knobs)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    return tx, step


def histories(tx, step, steps, shape=lambda tree: tree, **fault):
    """(params, state) before the first step and after each."""
    params = shape(model())
    # At scale 1, for the soft start counts stacked vectors as a matrix.
    state = lbw_optax.override(tx.init(params), scale=1.0)
    history = [(params, state)]
    for t in range(steps):
        params, state = step(params, state, shape(gradients_at(t, **fault)))
        history.append((params, state))
    return history


def of_layer(tree, number):
    """The leaves of a state or of parameters that are that layer's."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in paths]
    return {p: x for p, x in named if f"layers/{number}/" in p}


@pytest.mark.parametrize("optimizer", ["adamw", *slowly(*[*OPTIMIZERS][1:])])
def test_nan_in_one_layer_for_twenty_steps(optimizer):
    """It stays to the bit, moments and all, while every other layer trains; nothing is skipped."""
    history = histories(*stepping(optimizer), 40, bad=range(10, 30))
    still, moved = ((params, guard_in(s).inner_state) for params, s in (history[10], history[32]))
    for number in range(LAYERS):
        before, after = of_layer(still, number), of_layer(moved, number)
        same = [np.array_equal(x, after[path]) for path, x in before.items()]
        assert len(same) > 2
        assert all(same) == (number == STRUCK)
    assert int(lbw_optax.metrics(history[-1][1])["skips"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(history[-1]))
    events = [(e.action, e.step, e.group, e.signal) for e in lbw_optax.events(history[-1][1])]
    assert [e for e in events if e[0] in ("freeze", "thaw")] == [
        ("freeze", 10, "layers/3", "nonfinite_gradients"),
        ("thaw", 32, "layers/3", "nonfinite_gradients"),
    ]


@pytest.mark.parametrize("factor", [np.nan, 1e4])
def test_stacked_layers_freeze_as_single_ones_do(factor):
    fault = {"bad": range(30, 34), "factor": factor}
    one = histories(*stepping(), 50, **fault)
    other = histories(*stepping(groups=STACKED), 50, shape=stack, **fault)
    for (params, state), (stacked, stacked_state) in zip(one, other, strict=True):
        single = {k.replace("/", "[") + "]": n for k, n in lbw_optax.frozen_groups(state).items()}
        assert lbw_optax.frozen_groups(stacked_state) == single
        expected = stack(params)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), stacked, expected
        )
    assert lbw_optax.frozen_groups(other[31][1]) == {"layers[3]": 1}
    still = jax.tree.map(lambda x: x[STRUCK], other[30][0]["layers"])
    assert_same_bits(jax.tree.map(lambda x: x[STRUCK], other[34][0]["layers"]), still)
    moments = [history[1].inner_state[0].mu["layers"] for history in (other[30], other[34])]
    assert_same_bits(*[jax.tree.map(lambda x: x[STRUCK], mu) for mu in moments])


def test_a_step_that_jumps_is_not_taken():
    """Sound gradients, but one layer's second moment is lost: its step is 30 times as long."""
    tx, step = stepping()
    (params, state) = histories(tx, step, 40)[-1]
    adam, *rest = state.inner_state
    lost = adam.nu["layers"][STRUCK]
    adam.nu["layers"][STRUCK] = jax.tree.map(jnp.zeros_like, lost)
    state = state._replace(inner_state=(adam, *rest))
    after, state = step(params, state, gradients_at(40))
    assert lbw_optax.frozen_groups(state) == {"layers/3": 1}
    assert_same_bits(after["layers"][STRUCK], params["layers"][STRUCK])
    assert not np.array_equal(after["embed"], params["embed"])
    assert lbw_optax.events(state)[-1].signal == "relative_step"


def test_without_a_fault_the_run_is_that_without_groups():
    tx, step = stepping()
    off, off_step = stepping(groups=None)
    assert off.init(model()).freezing == ()
    with_groups, without = histories(tx, step, 40), histories(off, off_step, 40)
    for (params, state), (expected, expected_state) in zip(with_groups, without, strict=True):
        assert not lbw_optax.frozen_groups(state)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, expected
        )
        assert lbw_optax.frozen_groups(expected_state) == {}
        assert int(lbw_optax.metrics(expected_state)["frozen_groups"]) == 0


def test_the_set_changes_without_compiling_again():
    tx, _ = stepping()
    traces = []

    @jax.jit
    def step(params, state, gradients):
        traces.append(1)
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    before, after = histories(tx, step, 20, bad=range(5, 8))[::20]
    assert len(traces) == 1
    assert types(after[1]) == types(before[1])


def test_scan_and_vmap_and_donation_take_the_same_steps():
    """Two runs at once, in one program that may overwrite them; the second is sound."""
    tx, step = stepping()
    fault = {"bad": range(12, 15)}
    expected = histories(tx, step, 24, **fault)[-1]
    pairs = [(gradients_at(t, **fault), gradients_at(t)) for t in range(24)]
    given = stack_trees([stack_trees(pair) for pair in pairs])
    start = (model(), lbw_optax.override(tx.init(model()), scale=1.0))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, given):
        def both(carry, gradients):
            carry = jax.vmap(step)(*carry, gradients)
            return carry, (carry[1].freezing.frozen, lbw_optax.metrics(carry[1])["frozen_groups"])

        return jax.lax.scan(both, carry, given)

    (params, state), (frozen, counts) = run(stack_trees([start, start]), given)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: close(x[0], y), params, expected[0])
    assert_same_bits(state.freezing.since[0], expected[1].freezing.since)
    assert counts.tolist() == frozen.sum(-1).tolist()
    assert counts[:, 0].tolist() == [0] * 12 + [1] * 5 + [0] * 7
    assert not counts[:, 1].any()


def test_multi_steps_around_the_guard():
    tx = optax.MultiSteps(stepping()[0], 2)
    update = jax.jit(tx.update)
    params = model()
    state = tx.init(params)
    for t in range(20):
        updates, state = update(gradients_at(t, bad=range(10, 12)), state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        if t == 11:
            assert lbw_optax.frozen_groups(state) == {"layers/3": 1}
            assert not np.any(updates["layers"][STRUCK]["bias"])
            assert np.any(updates["layers"][2]["bias"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", [AxisType.Explicit, *slowly(AxisType.Auto)])
def test_slices_of_sharded_layers(kind):
    """One axis of the mesh over the layers, the other over their rows."""
    mesh = jax.make_mesh((2, 2), ("layer", "row"), axis_types=(kind, kind))
    specs = {"embed": P("row"), "layers": {"kernel": P("layer", "row"), "bias": P("layer")}}

    def shape(tree):
        tree = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), stack(tree))  # 5 layers
        tree["layers"] = {
            "kernel": np.pad(tree["layers"]["kernel"], [(0, 1), (0, 1), (0, 0)], mode="edge"),
            "bias": np.pad(tree["layers"]["bias"], [(0, 1), (0, 0)], mode="edge"),
        }
        return tree

    def put(tree):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    tx, step = stepping(groups=STACKED)
    expected = histories(tx, step, 14, shape=shape, bad=range(8, 10))
    with jax.set_mesh(mesh):
        found = histories(tx, step, 14, shape=lambda tree: put(shape(tree)), bad=range(8, 10))
    assert lbw_optax.frozen_groups(found[9][1]) == {"layers[3]": 1}
    assert found[9][0]["layers"]["kernel"].sharding.is_equivalent_to(
        NamedSharding(mesh, P("layer", "row")), 3
    )
    for (params, _), (other, _) in zip(found, expected, strict=True):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), params, other
        )


def test_observing_it_only_says_so():
    history = histories(*stepping(mode="observe"), 12, bad=range(10, 11), factor=1e6)
    assert lbw_optax.frozen_groups(history[11][1]) == {"layers/3": 1}
    before, after = (history[i][0]["layers"][STRUCK]["kernel"] for i in (10, 11))
    assert not np.array_equal(before, after)


def test_adapters_over_a_frozen_base():
    """The base is in no group that could freeze, and a NaN in its gradient harms nothing."""

    def labels(params):
        return {"base": "still", "layers": "train"}

    inner = optax.partition({"still": optax.set_to_zero(), "train": optax.adam(0.01)}, labels)
    tx = lbw_guard(inner, groups=by_layer)

    def adapted(t, bad=()):
        found = gradients_at(t, bad)
        return {
            "base": np.full(3, np.nan, "f") if t else np.ones(3, "f"),
            "layers": found["layers"],
        }

    params = adapted(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 12):
        updates, state = update(adapted(t, bad=[8]), state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        assert lbw_optax.frozen_groups(state) == ({"layers/3": t - 7} if 8 <= t < 11 else {})
    assert int(lbw_optax.metrics(state)["skips"]) == 0


# --- Names, words, and what is refused ---


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("layers/3/attn/q/kernel", "layers/3"),
        ("model/layers/11/mlp/w1", "model/layers/11"),
        ("params/Dense_0/kernel", "params/Dense_0"),
        ("h_2/ln_1/scale", "h_2"),
        ("mlp/w1", "mlp"),
        ("0/1", "0"),
        ("embed/embedding", "embed"),
        ("norm", "norm"),
    ],
)
def test_by_layer(path, name):
    assert by_layer(path) == name


def test_a_person_is_told_which_layer_it_is(tmp_path, caplog):
    *_, (_, state) = histories(*stepping(), 14, bad=range(10, 20))
    assert lbw_optax.explain(state).endswith(
        "Frozen while the rest trains: layers/3 (4 steps): its gradient is not finite."
    )
    with caplog.at_level(logging.WARNING, "lbw_optax"), lbw_optax.AuditLog(tmp_path / "a") as audit:
        audit.record(13, state)
    lines = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    frozen = [line for line in lines if line["action"] == "freeze"]
    assert [(x["group"], x["step"], x["value"], x["threshold"]) for x in frozen] == [
        ("layers/3", 10, 1.0, 1.0)
    ]
    assert "Step 10: layers/3 is frozen while the rest trains: " in caplog.text


def test_several_at_once_are_told_one_a_step():
    """With the step in which they froze, and not where the step has an action of its own."""
    limits, nothing = Limits(0.5, 50), jnp.zeros([])
    quiet = Decision(*[nothing] * 5, *[nothing] * 3)._replace(action=jnp.int32(Action.NONE))
    squares = np.ones(GROUPS, np.float32)
    squares[[1, 4, 5]] = np.nan
    state, told = freezing.init([str(i) for i in range(GROUPS)]), []
    for step in range(6):
        state = freezing.arrive(state, squares, jnp.float32(1), limits)
        skips = quiet._replace(action=jnp.int32(Action.SKIP))
        state, news = freezing.tell(state, skips if step == 1 else quiet, limits)
        if news.happened:
            told.append((int(news.group), step - int(news.steps_ago), step))
        else:
            assert news.decision.action == (Action.SKIP if step == 1 else Action.NONE)
    assert told == [(1, 0, 0), (4, 0, 2), (5, 0, 3)]


def test_the_head_of_a_chain_freezes_and_a_chained_watch_refuses():
    guard = lbw_guard(groups=by_layer)
    with pytest.raises(ValueError, match=r"groups needs a guard that governs the optimizer"):
        optax.chain(guard, optax.adamw(0.01)).init(model())
    tx = lbw_optax.chain(guard, optax.adamw(0.01))
    assert isinstance(tx.init(model()).freezing, freezing.Freezing)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"groups": "layers"}, r"groups must be a function .* got 'layers'"),
        ({"max_frozen": 1.0}, r"max_frozen must be a number between 0 and 1, got 1.0"),
        ({"max_frozen": 0}, r"max_frozen must be"),
        ({"max_freeze_steps": 0}, r"max_freeze_steps must be a whole number of at least 1, got 0"),
        ({"max_freeze_steps": 2.5}, r"max_freeze_steps must be"),
        ({"groups": lambda path: "all"}, r"groups makes 1 of these parameters, \['all'\]"),
        ({"groups": lambda path: None}, r"groups makes 0 of these parameters"),
        ({"max_frozen": 0.1}, r"max_frozen=0.1 of 5 groups is less than one.* 0.2 is the least"),
        ({"groups": lambda path: 3}, r"a str, or None .* of 'embed' it gave 3"),
        ({"groups": lambda path: "x[*]"}, r"'layers/0/bias' has 4 where others have 9"),
        ({"groups": lambda path: "[*]"}, r"must give the name"),
        ({"groups": lambda path: "x\udc80"}, r"must give the name"),
        ({"groups": lambda path: "x\0"}, r"must give the name"),
        (
            {"groups": lambda path: "x[*]" if path == "embed" else "x[0]"},
            r"two groups with the name 'x\[0\]'",
        ),
    ],
)
def test_what_is_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        lbw_guard(optax.adamw(0.01), **{"groups": by_layer, **knobs}).init(model())


def test_what_is_called_for_a_schedule_or_without_half_of_its_leaves():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    injected = optax.inject_hyperparams(lbw_guard)(optax.sgd(0.1), groups=by_layer, max_frozen=0.5)
    with pytest.raises(ValueError, match=r"takes the path .* static_args=\('groups',\)"):
        injected.init(params)
    both = optax.LookaheadParams.init_synced(params)
    tx = lbw_guard(optax.lookahead(optax.sgd(0.1), 2, 0.5), groups=lambda path: path)
    with pytest.raises(ValueError, match=r"other leaves than the parameters .* Put optax.lookahea"):
        tx.update(params, tx.init(both), both, value=1.0)


def test_a_leaf_without_slices_cannot_be_stacked():
    params = {"a": jnp.ones(4), "b": jnp.float32(1)}
    with pytest.raises(ValueError, match=r"'b' has shape \(\): give it a name without"):
        lbw_guard(optax.adamw(0.01), groups=lambda path: path + "[*]").init(params)


def test_a_state_of_other_groups_is_refused():
    tx = lbw_guard(optax.adamw(0.01), groups=by_layer)
    state = lbw_guard(optax.adamw(0.01)).init(model())
    with pytest.raises(ValueError, match=r"make 5 groups, .*, and this state was made with 0"):
        tx.update(gradients_at(0), state, model(), value=1.0)


def test_a_state_goes_on_with_groups_of_other_names():
    """As of a checkpoint: whoever keeps a name keeps a history, and nobody has another's."""
    state = freezing.init(["ab", "cd"])
    state = freezing.arrive(state, jnp.array([3.0, 5.0]), jnp.float32(1), Limits(0.5, 50))
    found = freezing.named(state, ["cd", "xy"])
    fresh = freezing.init(["cd", "xy"])
    assert_same_bits(jax.tree.map(lambda x: x[1:], found), jax.tree.map(lambda x: x[1:], fresh))
    assert types(found) == types(state)
    assert_same_bits(freezing.named(state, ["ab", "cd"]), state)
    assert decoded(found.names) == ["cd", "xy"]
    tx = lbw_guard(optax.sgd(0.1), groups=lambda path: path, max_frozen=0.5)
    one, other = ({name: jnp.ones(2) for name in names} for names in (["a", "b"], ["a", "long"]))
    with pytest.raises(ValueError, match=r"make 2 groups, \['a', 'long'\], .* with \['a', 'b'\]"):
        tx.update(other, tx.init(one), other, value=1.0)


@pytest.mark.parametrize("most", [10**12, 50.0, np.int64(2**40)])
def test_any_number_of_steps_may_be_allowed(most):
    tx = lbw_guard(optax.sgd(0.1), groups=lambda path: path, max_frozen=0.5, max_freeze_steps=most)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, value=jnp.float32(1))[1], params)
    assert types(state) == types(tx.init(params))


def test_the_state_can_be_mapped_and_made_abstractly():
    tx, _ = stepping()
    state = tx.init(model())
    assert types(jax.eval_shape(tx.init, model())) == types(state)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert_same_bits(mapped.freezing, state.freezing)

"""What the guards say of a step, packed and read: against the same, worked out by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rollback_loop import QUICK, start
from support import guard_in

from lbw_optax import RollbackManager, lbw_guard
from lbw_optax.law.divergence import CEILING, Reason
from lbw_optax.rollback import agreement, verdict
from lbw_optax.rollback.verdict import Verdict

NOTHING: dict[str, Any] = {
    "asked": 0,
    "guard_steps": 5,
    "troubled": False,
    "suspected": False,
    "broken": False,
    "exhausted": False,
    "governs": True,
    "requested": False,
    "differs": False,
    "saved_alone": False,
    "complaint": "",
}


def is_at(path: Any, name: str) -> bool:
    """Whether the path of a leaf ends with this name."""
    return f".{jax.tree_util.keystr(path, simple=True, separator='.')}".endswith(f".{name}")


def guard(**fields: Any) -> Any:
    """A guard's state after five calm steps, with some of its numbers changed."""
    state = lbw_guard(optax.sgd(0.1)).init(jnp.ones(3))
    wanted = {"guard_steps": 5, "calm_steps": 5} | fields

    def change(path: Any, x: jax.Array) -> jax.Array:
        new = [value for name, value in wanted.items() if is_at(path, name)]
        return jnp.asarray(new[0], x.dtype) if new else x

    return jax.tree_util.tree_map_with_path(change, state)


def said(*guards: Any, requested: bool = False, before: int | None = 4) -> Verdict:
    return verdict.read(verdict.begin(9, guards, requested=requested), before)


CASES = {
    "nothing": ([{}], {}),
    "asked": ([{"rollback_asked": Reason.SKIPS}], {"asked": 3}),
    "a_skip": ([{"calm_steps": 0}], {"troubled": True}),
    "suspected": ([{"loss_excess": 0.1}], {"suspected": True}),
    "broken": ([{"parameters_broken": True}], {"broken": True}),
    "exhausted": ([{"exhausted": True}], {"exhausted": True}),
    "observing": ([{"mode": 1, "exhausted": True}], {"governs": False}),
    "the_first_of_two": (
        [{"rollback_asked": 1, "calm_steps": 0}, {"guard_steps": 7, "calm_steps": 7}],
        {"asked": 1, "troubled": True, "guard_steps": 7},
    ),
    "the_second_of_two": ([{}, {"exhausted": True}], {"exhausted": True}),
    "one_observes_and_one_is_exhausted": (
        [{"mode": 1, "exhausted": True}, {}],
        {"exhausted": False},
    ),
    "far_on": ([{"guard_steps": 2**31 - 1, "calm_steps": 2**31 - 1}], {"guard_steps": 2**31 - 1}),
}


@pytest.mark.parametrize(("guards", "expected"), CASES.values(), ids=CASES)
def test_what_is_packed_is_read(guards, expected):
    before = 2**31 - 2 if expected.get("guard_steps", 0) > 10 else 4
    assert said(*[guard(**g) for g in guards], before=before) == Verdict(
        **{"step": 9, **NOTHING, **expected}
    )


@pytest.mark.parametrize(("before", "troubled"), [(4, False), (3, False), (2, True), (None, False)])
def test_trouble_since_the_verdict_before(before, troubled):
    """The last skip was three steps ago, of the five there have been."""
    assert said(guard(calm_steps=2), before=before).troubled == troubled


def test_a_request_is_heard():
    assert said(guard(), requested=True).requested


@pytest.mark.parametrize("extreme", [0.0, -0.0, 1e-45, 3e38, -3e38, np.inf, -np.inf, np.nan])
def test_any_loss_is_packed(extreme):
    assert said(guard(**{"telemetry.loss": extreme, "log_scale": -87.0})) == Verdict(
        step=9, **NOTHING
    )


# --- copies that differ ------------------------------------------------------------------------


def on_all_devices(tree: Any, change: dict[str, Any]) -> Any:
    """Replicated, but for some leaves of the copy on the last device: as a local loss makes it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, x: jax.Array) -> jax.Array:
        copies = [np.array(x) for _ in mesh.devices]
        new = [value for name, value in change.items() if is_at(path, name)]
        copies[-1] = np.asarray(new[0] if new else x, x.dtype)
        parts = [jax.device_put(c, d) for c, d in zip(copies, mesh.devices, strict=True)]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, parts)

    return jax.tree_util.tree_map_with_path(place, tree)


def test_the_largest_of_all_copies():
    x = on_all_devices({"x": jnp.arange(3)}, {"x": [5, 0, 2]})["x"]
    assert agreement.largest(x).tolist() == [5, 1, 2]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({}, False),
        ({"log_scale": -1.0}, True),
        ({"telemetry.loss": 2.01}, True),
        ({"telemetry.loss": np.nan}, True),
        ({"skips": 1}, True),
        ({"telemetry.loss": 2.000001}, False),  # the last bits may differ between machines
    ],
)
def test_copies_that_differ(change, differs):
    assert said(on_all_devices(guard(**{"telemetry.loss": 2.0}), change)).differs == differs


def test_one_copy_that_asks():
    assert said(on_all_devices(guard(), {"rollback_asked": 1})).asked == 1


def test_a_loss_of_its_own_on_each_device_is_told(tmp_path):
    """Not at once: a fault of memory is answered by a rollback within two steps."""
    with RollbackManager(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(on_all_devices(start(), {}))
        tree = on_all_devices(start(), {"telemetry.loss": 2.0})
        for step in range(1, 4):
            rollback.step(step, tree)
        with pytest.raises(ValueError, match=r"Pass the same to all.*value=jax\.lax\.pmean\(loss"):
            rollback.step(4, tree)


# --- a state for each device, as pmap keeps it ---------------------------------------------------

COUNT, SIZE = 2, 4
tx = lbw_guard(optax.adamw(0.3))


def update_one(params: Any, state: Any, target: Any, shares: Any) -> Any:
    """On one of the replicas, which average over "replicas" what they are told to share."""

    def loss_of(params: Any) -> jax.Array:
        return jnp.mean((params - target) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(params)
    if "gradients" in shares:
        gradients = jax.lax.pmean(gradients, "replicas")
    if "loss" in shares:
        loss = jax.lax.pmean(loss, "replicas")
    updates, state = tx.update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state


def stacked(same: bool) -> Any:
    """A state for each replica; of the same parameters, or of a seed each."""
    rng = np.random.default_rng(0)
    params = rng.normal(size=(1 if same else COUNT, SIZE)).astype("f")
    params = jnp.asarray(np.broadcast_to(params, (COUNT, SIZE)))
    return params, jax.vmap(tx.init)(params)


def go(directory: Any, over: Any, shares: tuple[str, ...], same: bool = True) -> Any:
    """Ten steps with a manager; the parameters, and how far apart they are in the end."""
    step_of = functools.partial(update_one, shares=shares)
    step_of = jax.jit(over(step_of, axis_name="replicas"))
    with RollbackManager(directory, save_every=100) as rollback:
        step, tree = rollback.resume(stacked(same))
        while step < 10:
            noise = np.random.default_rng(rollback.data_step(step)).normal(size=(COUNT, SIZE))
            tree = step_of(*tree, (np.arange(COUNT)[:, None] + noise).astype("f"))
            step, tree = rollback.step(step + 1, tree)
    return np.ptp(np.asarray(tree[0]), axis=0).max()


@pytest.mark.parametrize("shares", [("gradients",), ("loss",)], ids=["loss", "gradients"])
def test_replicas_that_each_have_their_own(tmp_path, shares):
    with pytest.warns(RuntimeWarning, match=r"Pass the same to all.*pmean\(loss") as said:
        go(tmp_path, jax.pmap, shares)
    assert sum("pmean" in str(x.message) for x in said) == 1


@pytest.mark.parametrize(
    ("over", "shares", "same"),
    [
        (jax.pmap, ("gradients", "loss"), True),
        (jax.pmap, (), False),
        (jax.vmap, (), True),
    ],
    ids=["replicas", "a_seed_on_each_device", "runs_that_begin_alike"],
)
@pytest.mark.filterwarnings("error")
def test_replicas_that_agree_and_runs_of_their_own_are_left_alone(tmp_path, over, shares, same):
    assert (go(tmp_path, over, shares, same) == 0) == (len(shares) == 2)


@pytest.mark.parametrize("over", [jax.vmap, jax.pmap])
def test_runs_in_one_state_go_back_together_and_on(tmp_path, over):
    """To where each of them was, and each under a ceiling and with the event of its own."""
    step_of = jax.jit(over(functools.partial(update_one, shares=()), axis_name="replicas"))
    noise = np.random.default_rng(0).normal(size=(30, COUNT, SIZE)).astype("f")
    seen = {}
    with RollbackManager(tmp_path, snapshot_every=4, probation=3) as rollback:
        step, tree = rollback.resume(stacked(False))
        while step < 20:
            seen[step] = jax.device_get(tree)
            step, tree = rollback.step(step + 1, step_of(*tree, noise[step]))
        rollback.request("by hand")
        left = step_of(*tree, noise[20])
        known = guard_in(left[1]).events.recorded.tolist()
        step, tree = rollback.step(21, left)
        np.testing.assert_array_equal(tree[0], seen[step][0])
        found, before = guard_in(tree[1]), guard_in(seen[step][1])
        assert found.events.recorded.tolist() == [n + 1 for n in known]
        expected = before.law.control.log_scale + np.log(CEILING)
        np.testing.assert_allclose(found.law.control.log_ceiling, expected, rtol=1e-6)
        while step < 25:
            step, tree = rollback.step(step + 1, step_of(*tree, noise[step]))
        # What was asked for an uncertain reason is dropped in each.
        asking = optax.tree.set(
            tree[1], rollback_asked=jnp.full(COUNT, int(Reason.LOSS), jnp.int32)
        )
        quiet = rollback._go_on((tree[0], asking))
        assert guard_in(quiet[1]).law.divergence.rollback_asked.tolist() == [0] * COUNT


def test_keys_of_their_own_do_not_make_replicas_runs():
    keys = jax.random.split(jax.random.key(0), COUNT)
    same = {"p": jnp.ones((COUNT, 3)), "n": jnp.full((COUNT, 2), jnp.nan), "keys": keys}
    assert agreement.is_stack_of_equals(same, COUNT)
    assert not agreement.is_stack_of_equals(same | {"p": jnp.arange(2.0)}, COUNT)

"""Copies in memory: how often, where, and what is said of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollback_loop import batch, nan_parameter, plain, run, start, update
from support import assert_same_bits

from lbw_optax import RollbackManager
from lbw_optax.rollback import memory, pace, places, snapshots
from lbw_optax.rollback.pace import Bounds, Pace

# --- how often -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overhead", [0.003, 0.01, 0.1])
def test_the_cadence_is_the_smallest_within_the_budget(overhead):
    for copy in (0.0, 1e-4, 3e-3, 0.14, 2.0):
        for step in (1e-3, 0.12, 0.5, 20.0):
            every = pace.choose(copy, step, overhead, Bounds(3, 39))
            fits = [n for n in range(3, 40) if copy <= overhead * n * step * (1 + 1e-9)]
            assert every == (fits[0] if fits else 39), (copy, step)
    assert pace.choose(0.1, 0.0, overhead, Bounds(3, 39)) == 39  # a clock that stands still


@pytest.mark.parametrize(
    ("distance", "probation", "is_small", "expected"),
    [
        (50, 2, True, (1, 39)),
        (50, 2, False, (3, 39)),
        (4, 2, False, (1, 1)),
        (20, 9, False, (2, 2)),
    ],
)
def test_bounds_keep_the_distance(distance, probation, is_small, expected):
    allowed = pace.bounds(distance, probation, is_small=is_small)
    assert allowed == expected
    assert allowed.most + probation + 1 <= distance


class Clock:
    """Seconds that go by when the test says so, and `tick` at every look."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_a_step_is_timed_without_what_comes_between():
    clock, times = Clock(), []
    timed = Pace(clock)
    for step in range(130):
        if timed.tick(2 * step):  # only every other step is handed in
            times.append(step)
        clock.now += 100.0 if step % 10 == 0 else 0.5  # an evaluation
    assert times == [64, 128]
    assert timed.step_seconds == pytest.approx(0.25)


def test_after_a_rollback_the_time_between_is_no_step():
    clock = Clock()
    timed = Pace(clock)
    for step in (1, 2, 3, 1, 2):
        timed.tick(step)
        clock.now += 99.0 if step == 3 else 1.0
    assert list(timed._steps) == [1.0, 1.0, 1.0]


def trained(directory, steps, clock, step_seconds, faults=(), **options):
    """A run on a clock of its own: a copy takes `clock.tick`, and so does every look at it."""
    with RollbackManager(directory, **options) as rollback:
        rollback._candidates._pace = Pace(clock)
        step, tree = rollback.resume(start())
        while step < steps:
            tree = update(tree, batch(rollback.data_step(step)))
            clock.now += step_seconds - clock.tick
            if step + 1 in faults and not rollback.history:
                tree = nan_parameter(tree)
            step, tree = rollback.step(step + 1, tree)
        return tree, rollback


@pytest.mark.parametrize(
    ("copy", "every", "overhead"),
    [(0.001, 1, 0.005), (0.01, 5, 0.01), (0.5, 39, 0.5 / 39 / 0.2)],
)
def test_the_manager_measures_and_chooses(tmp_path, copy, every, overhead):
    """Seven before it has timed enough steps; the longest cadence where none is cheap enough."""
    tree, rollback = trained(tmp_path / "a", 64, Clock(copy), 0.2)
    assert rollback.report().snapshot_every == 7
    tree, rollback = trained(tmp_path / "b", 130, Clock(copy), 0.2)
    said = rollback.report()
    assert (said.place, said.snapshot_every) == ("host", every)
    assert said.step_seconds == pytest.approx(0.2)
    assert said.copy_seconds == pytest.approx(copy)
    assert said.overhead == pytest.approx(overhead)
    assert f"every {every} steps" in str(said)
    assert_same_bits(tree, plain(130))


def test_where_every_step_is_copied_a_rollback_loses_next_to_nothing(tmp_path):
    tree, rollback = trained(tmp_path, 120, Clock(1e-4), 0.2, faults=[100])
    (event,) = rollback.history
    assert rollback.report().snapshot_every == 1
    assert event.to_step >= 97
    assert event.from_step - event.to_step <= 5
    assert np.isfinite(np.asarray(tree[0]["w"])).all()


@pytest.mark.parametrize("at", range(20, 24))
def test_copies_of_every_step_prove_themselves(tmp_path, at):
    """Several are on probation at a time, and never the poisoned one is gone back to."""
    seen, held = {}, []

    def watch(rollback, step, tree):
        held.append(rollback.memory_bytes)
        if rollback.history and not seen:
            seen[step] = jax.tree.map(jnp.copy, tree[0])

    options = {"snapshot_every": 1, "probation": 2, "save_every": 500, "max_distance": 50}
    run(tmp_path, at + 6, {at: nan_parameter}, on_step=watch, **options)
    ((step, params),) = seen.items()
    assert at - 3 <= step < at
    assert_same_bits(params, plain(step)[0])
    assert max(held) <= (4 + 3) * snapshots.nbytes(start())


@pytest.mark.parametrize(("kept", "expected"), [(2, [29, 28]), (4, [29, 28, 21, 14])])
def test_older_copies_are_spread(kept, expected):
    """For a fault that the newest holds already; a cadence of seven keeps the last ones."""
    for every, steps in ((1, expected), (7, [28, 21, 14, 7][:kept])):
        held = memory.Memory(every, 2, lambda snapshot, verdict: True)
        held.kept = kept
        for step in range(0, 30, every):
            held._keep(snapshots.Snapshot(step, {}, None, np.zeros(0), []))
        assert held.steps[::-1] == steps


# --- where ---------------------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("platform", "kinds", "nbytes", "free", "expected"),
    [
        ("gpu", ["device", "pinned_host"], 3 * GB, 60 * GB, ("device", True)),
        ("gpu", ["device", "pinned_host"], 3 * GB + 1, 60 * GB, ("pinned_host", False)),
        ("gpu", ["device", "pinned_host"], 1, None, ("pinned_host", False)),
        ("gpu", ["device"], 30 * GB, 60 * GB, ("device", False)),
        ("tpu", ["device", "pinned_host"], 30 * GB, 60 * GB, ("pinned_host", False)),
        ("cpu", ["device", "pinned_host"], GB, 60 * GB, ("host", True)),
        ("cpu", ["device", "pinned_host"], 30 * GB, 60 * GB, ("host", False)),
    ],
)
def test_place(platform, kinds, nbytes, free, expected):
    assert places.choose(platform, kinds, nbytes, free) == expected


def test_free_memory_of_this_machine():
    free = places.free_bytes(jax.devices()[0])
    assert free is None or 0 < free < 2**50


needs_pinned = pytest.mark.skipif(
    places.PINNED not in places.kinds(jax.devices()[0]), reason="this jax has no pinned memory here"
)


def kinds_of(tree):
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)]


@needs_pinned
def test_a_copy_in_pinned_memory_comes_back_to_where_the_state_is():
    """Bit for bit, also after the state has been donated; and once more after the restored one."""
    tree = {"w": jnp.linspace(-1, 1, 1000), "key": jax.random.key(3)}
    wanted = {"w": np.array(tree["w"]), "key": np.array(jax.random.key_data(tree["key"]))}
    leaves = snapshots.flatten(tree)
    pinned = snapshots._copy(leaves, dict.fromkeys(leaves, places.PINNED))
    assert set(kinds_of(pinned)) == {places.PINNED}
    snapshot = snapshots.take(0, tree)._replace(leaves=pinned)
    for _ in range(2):
        back = snapshots.restore(snapshot, tree)
        assert kinds_of(back) == kinds_of(tree)
        assert_same_bits(back["w"], wanted["w"])
        assert_same_bits(jax.random.key_data(back["key"]), wanted["key"])
        back["w"].delete()


@needs_pinned
@pytest.mark.parametrize("on_device", [False, True])
def test_a_leaf_that_is_offloaded_is_copied_and_stays_so(on_device):
    moment = jnp.arange(1000.0)
    place = moment.sharding.with_memory_kind(places.PINNED)
    tree = {"moment": jax.device_put(moment, place), "w": jnp.ones(3)}
    snapshot = snapshots.take(0, tree, on_device=on_device)
    held = [x.unsafe_buffer_pointer() for x in snapshot.leaves.values()]
    assert not set(held) & {x.unsafe_buffer_pointer() for x in tree.values()}
    kinds = kinds_of(tree)
    for leaf in tree.values():
        leaf.delete()
    back = snapshots.restore(snapshot, {"moment": jax.device_put(moment, place), "w": jnp.ones(3)})
    assert kinds_of(back) == kinds
    assert_same_bits(np.array(back["moment"]), np.arange(1000, dtype=np.float32))


@needs_pinned
def test_memory_is_reserved_for_any_state():
    snapshots.reserve({"w": jnp.ones((3, 4)), "host": np.zeros(2), "key": jax.random.key(0)}, 2)


# --- what is said --------------------------------------------------------------------------------


def test_report(tmp_path):
    size = snapshots.nbytes(start())
    _, rollback, _ = run(tmp_path, 20)
    said = rollback.report()
    assert (said.place, said.snapshot_every, said.save_every) == ("host", 4, "8 steps")
    assert said.device_bytes == 0
    assert said.host_bytes == rollback.memory_bytes
    assert said.disk_bytes == len(rollback._journal.checkpoints) * size
    assert said.step_seconds > 0
    assert said.write_seconds > 0
    assert math.isnan(said.overhead)
    _, rollback, _ = run(tmp_path, 30, snapshot_every=None)
    said = rollback.report()
    assert (said.place, said.snapshot_every, said.host_bytes) == ("off", None, 0)
    assert str(said).startswith("no copies in memory, checkpoints after 8 steps (")


@pytest.mark.parametrize("overhead", [0, -0.1, math.nan, math.inf, "1 %", True])
def test_a_budget_is_a_share(tmp_path, overhead):
    with pytest.raises(ValueError, match="overhead must be a finite share above 0, got"):
        RollbackManager(tmp_path, overhead=overhead)


def test_a_budget_may_be_a_number_of_numpy(tmp_path):
    RollbackManager(tmp_path, overhead=np.float32(0.01)).close()

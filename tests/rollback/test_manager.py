"""Going back: when, where to, and what is left of it. Real faults in a real run."""

import contextlib
import functools
import itertools
import json
import math
import re
import threading
import warnings
from datetime import timedelta

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rollback_loop import (
    QUICK,
    Patient,
    batch,
    flip_bit,
    flip_parameter,
    in_moment,
    mean_loss,
    nan_parameter,
    plain,
    run,
    start,
    update,
)
from support import assert_all_finite, assert_same_bits, guard_in, slowly

import lbw_optax
from lbw_optax import AuditLog, GuardExhausted, RollbackManager, orders
from lbw_optax.law.divergence import CEILING, CEILING_STEPS
from lbw_optax.rollback import cadence, checkpoints
from lbw_optax.state import Mode

TIERS = {"memory": {}, "disk": {"snapshot_every": None}}
NAN_BATCH = batch(0)[0] * np.float32("nan"), batch(0)[1]


@functools.cache
def healthy_loss() -> float:
    """Of the finished run, without a fault."""
    return mean_loss(plain(140))


def checkpoints_in(directory) -> list[int]:
    names = [path.name for path in directory.glob("checkpoints/*")]
    return sorted(int(name) for name in names if name.isdecimal())  # others are being written


# --- without a fault ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_without_a_fault_nothing_changes(tmp_path, options):
    tree, rollback, used = run(tmp_path, 60, **options)
    assert_same_bits(tree, plain(60))
    assert rollback.history == []
    assert used == list(range(60))


def test_step_gives_back_the_same_objects(tmp_path):
    with Patient(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        for _ in range(30):
            tree = update(tree, batch(step))
            same = rollback.step(step + 1, tree)
            assert same[0] == step + 1
            assert same[1] is tree
            step, tree = same


def test_the_verdict_is_read_one_call_later(tmp_path):
    """The call that hands a state in never waits for it."""
    asked_at = {}

    def watch(rollback, step, tree):
        if int(lbw_optax.metrics(tree[1])["rollback_asked"]):
            asked_at.setdefault("guard", rollback._journal.calls)
        if rollback.history:
            asked_at.setdefault("rollback", rollback._journal.calls)

    run(tmp_path, 40, {30: nan_parameter}, on_step=watch)
    assert asked_at["rollback"] == asked_at["guard"] + 1


def test_the_training_step_is_compiled_once(tmp_path):
    update.clear_cache()  # other modules may have given it a state that is placed otherwise
    for tier, options in TIERS.items():
        run(tmp_path / tier, 30, {20: nan_parameter}, **options)
        assert update._cache_size() == 1, tier
    run(tmp_path / "disk", 40, **TIERS["disk"])  # and after a resume
    assert update._cache_size() == 1


# --- faults ------------------------------------------------------------------------------------

FAULTS = {
    "nan_parameter": (nan_parameter, "parameters"),
    "bit_30_of_a_parameter": (flip_parameter(30), "parameters"),
    "bit_30_of_the_first_moment": (in_moment("mu", lambda m: flip_bit(m, 30)), "inner_state"),
    "nan_in_the_first_moment": (in_moment("mu", lambda m: m.at[0].set(jnp.nan)), "inner_state"),
    "nan_in_the_second_moment": (in_moment("nu", lambda m: m.at[0].set(jnp.nan)), "inner_state"),
}


# Each fault from one of the tiers.
PLACES = list(zip(FAULTS, itertools.cycle(TIERS), strict=False))


@pytest.mark.parametrize(
    ("name", "tier"),
    [*PLACES, *slowly(*sorted({*itertools.product(FAULTS, TIERS)} - {*PLACES}))],
)
def test_a_corrupted_state_is_left(tmp_path, name, tier):
    fault, reason = FAULTS[name]
    tree, rollback, _ = run(tmp_path, 140, {40: fault}, **TIERS[tier])
    assert_all_finite(tree)
    (event,) = rollback.history
    assert (event.reason, event.tier) == (reason, tier)
    assert event.from_step - 40 <= 3
    assert event.from_step - event.to_step <= QUICK["max_distance"]
    assert mean_loss(tree) < 1.05 * healthy_loss()


def test_bad_batches_are_skipped_and_many_left_behind(tmp_path):
    """Skipping is cheaper than going back, until it has gone on for long."""
    for count, reasons in ((19, []), (25, ["skips"])):
        bad = dict.fromkeys(range(40, 40 + count), NAN_BATCH)
        tree, rollback, used = run(tmp_path / str(count), 140, bad_batches=bad, max_distance=40)
        assert [event.reason for event in rollback.history] == reasons
        assert len(used) == len(set(used))
        assert mean_loss(tree) < 1.05 * healthy_loss()


def test_data_that_stays_broken_ends_the_run_with_an_error(tmp_path):
    """The state was proven good, so going back again cannot help, and nor can skipping on."""
    bad = dict.fromkeys(range(40, 10**4), NAN_BATCH)
    with pytest.raises(
        GuardExhausted, match=r"in a row.*61 to \d+ \(skips\).*checkpoint in .*data"
    ):
        run(tmp_path, 10**4, bad_batches=bad, max_distance=40)
    with RollbackManager(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
    assert len(rollback.history) == 1
    assert step <= 36 + 30 + 2  # thirty skips in a row exhaust the guard, and change nothing
    assert_same_bits(tree[0], plain(rollback.history[0].to_step)[0])


@pytest.mark.parametrize("again", [True, *slowly(False)])
def test_a_person_may_go_on_from_an_exhausted_guard(tmp_path, again):
    """With the step after the one that raised, or with that one."""
    bad = dict.fromkeys(range(40, 100), NAN_BATCH)
    tree, raised = start(), []
    with Patient(tmp_path, **(QUICK | {"max_distance": 40})) as rollback:
        step, tree = rollback.resume(tree)
        while step < 140:
            index = rollback.data_step(step)
            tree = update(tree, bad.get(index) or batch(index))
            try:
                step, tree = rollback.step(step + 1, tree)
            except GuardExhausted:
                raised.append(step + 1)
                tree = tree[0], lbw_optax.reset(tree[1])
                step, tree = rollback.step(step + 1, tree) if again else (step + 1, tree)
    assert len(raised) == 1
    assert mean_loss(tree) < 1.05 * healthy_loss()


def test_an_exhausted_guard_that_observes_ends_nothing(tmp_path):
    params, state = start()
    state = optax.tree.set(lbw_optax.override(state, mode="observe"), exhausted=jnp.array(True))
    tree, rollback, _ = run(tmp_path, 20, tree=(params, state))
    assert bool(lbw_optax.metrics(tree[1])["exhausted"])
    assert rollback.history == []


@pytest.mark.parametrize("tier", ["memory", *slowly("disk")])
def test_a_broken_first_gradient_is_not_remembered(tmp_path, tier):
    """Nothing is known yet in the first step: the next ones tell, and the run begins again."""
    huge = batch(0)[0] * np.float32(30), batch(0)[1] * np.float32(1e3)
    tree, rollback, used = run(tmp_path, 140, bad_batches={0: huge}, **TIERS[tier])
    (event,) = rollback.history
    assert (event.to_step, event.reason) == (0, "inner_state")
    assert event.from_step <= 12
    assert used.count(0) == 1
    assert mean_loss(tree) < 1.05 * healthy_loss()
    assert mean_loss(plain(140, batches=lambda i: batch(i) if i else huge)) > 1.5 * healthy_loss()


def test_a_loss_that_has_diverged(tmp_path):
    """Wrecked weights of ordinary size: nothing shows but the loss."""

    def wreck(tree):
        return jax.tree.map(lambda p: -p, tree[0]), tree[1]

    tree, rollback, _ = run(tmp_path, 140, {100: wreck}, max_distance=40)
    (event,) = rollback.history
    assert event.reason in ("loss", "skips")
    assert event.from_step - 100 <= 8
    assert mean_loss(tree) < 1.05 * healthy_loss()


def test_request(tmp_path):
    def ask(rollback, step, tree):
        if step == 30 and not rollback.history:
            rollback.request("the evaluation looked wrong")

    _, rollback, _ = run(tmp_path, 40, on_step=ask)
    (event,) = rollback.history
    assert (event.from_step, event.reason) == (31, "the evaluation looked wrong")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (ValueError("bad shard"), "bad shard"),
        (ValueError(), "request"),
        (None, "request"),
        (b"x", "b'x'"),
        (float("nan"), "nan"),
        (np.zeros(2), "[0. 0.]"),
        pytest.param("\ud800", "\\ud800", id="half a character"),
    ],
)
def test_a_request_of_any_kind_is_written_as_words(tmp_path, reason, words):
    with Patient(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
        for _ in range(10):
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
        rollback.request(reason)
        step, tree = rollback.step(step + 1, update(tree, batch(step)))
    with RollbackManager(tmp_path) as again:
        assert [r.reason for r in again.history] == [words]


@pytest.mark.parametrize("first", [1, 2**31 - 8, 2**31 + 5])
def test_a_state_of_numpy_and_of_any_step_is_gone_back_from(tmp_path, first):
    """What a loop hands in may have come from a file; the ring's int32 ends where counters do."""
    with Patient(tmp_path, **QUICK) as rollback:
        _, tree = rollback.resume(start())
        for step in range(first, first + 14):
            tree = update(tree, batch(step))
            assert rollback.step(step, tree)[0] == step
        rollback.request("by hand")
        broken = jax.tree.map(np.asarray, update(tree, batch(step)))
        back, tree = rollback.step(step + 1, broken)
        event = lbw_optax.events(tree[1])[-1]
        for step in range(back, back + 3):
            tree = update(tree, batch(step))
            assert rollback.step(step + 1, tree)[0] == step + 1
    assert (rollback.history[0].from_step, rollback.history[0].to_step) == (first + 14, back)
    assert (event.from_step, event.to_step) == (min(first + 14, 2**31 - 1), min(back, 2**31 - 1))


def test_observing_never_goes_back_but_says_so(tmp_path):
    params, state = start()
    tree = params, lbw_optax.override(state, mode="observe")
    with pytest.warns(RuntimeWarning, match="none to go back to, for a NaN in 0.w: find"):
        tree, rollback, _ = run(tmp_path, 40, {32: nan_parameter}, tree=tree)
    assert rollback.history == []
    assert int(lbw_optax.metrics(tree[1])["rollback_asked"]) > 0


# --- candidates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("at", [24, 27, *slowly(30, 33)])
def test_a_poisoned_state_is_never_gone_back_to(tmp_path, at, options):
    """Whatever copies are due around the fault, the target is older, sound and the right state."""
    seen = {}

    def watch(rollback, step, tree):
        if rollback.history and not seen:
            seen["step"], seen["tree"] = step, jax.tree.map(jnp.copy, tree)

    _, rollback, _ = run(tmp_path, at + 4, {at: nan_parameter}, on_step=watch, **options)
    assert seen["step"] == rollback.history[0].to_step < at
    expected = plain(seen["step"])
    assert_same_bits(seen["tree"][0], expected[0])
    assert_same_bits(seen["tree"][1].inner_state, expected[1].inner_state)
    assert_same_bits(guard_in(seen["tree"][1]).law.statistics, guard_in(expected[1]).law.statistics)


def test_a_nan_in_the_optimizers_state_is_not_gone_back_to(tmp_path):
    """One that the guard has not seen: the leaf is named, once."""

    def hand_in(rollback, step, tree):
        while step < 30:
            tree = update(tree, batch(step))
            broken = in_moment("mu", lambda m: m.at[0].set(jnp.nan))(tree)
            step, _ = rollback.step(step + 1, tree if step < 12 else broken)
        return step, tree

    with Patient(tmp_path, **QUICK) as rollback:
        started = rollback.resume(start())
        with pytest.warns(
            RuntimeWarning, match="go back to, for a NaN in 1.inner_state.0.mu.w: find"
        ) as w:
            step, tree = hand_in(rollback, *started)
        rollback.request("now")
        step, tree = rollback.step(31, update(tree, batch(step)))
    assert len(w) == 1
    assert step <= 12
    assert_all_finite(tree)


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_a_nan_elsewhere_is_the_runs_own(tmp_path, options):
    """Statistics of a skipped batch, or a best loss before the first evaluation."""
    own = {
        "best": jnp.float32(jnp.nan),
        "variance": jnp.full(3, jnp.nan),
        "host": np.float64("nan"),
    }
    with Patient(tmp_path, **(QUICK | options)) as rollback:
        step, (tree, own) = rollback.resume((start(), own))
        while step < 30:
            tree = update(tree, batch(step))
            step, (tree, own) = rollback.step(step + 1, (tree, own))
        rollback.request("now")
        back, _ = rollback.step(31, (update(tree, batch(step)), own))
    assert back == 24
    with RollbackManager(tmp_path, **QUICK) as rollback:
        step, (tree, own) = rollback.resume((start(), own))
    assert step == 24
    assert np.isnan(own["host"])


def test_trouble_again_goes_further_back(tmp_path):
    steps = []
    with Patient(tmp_path, **(QUICK | {"max_distance": 40})) as rollback:
        step, tree = rollback.resume(start())
        while step < 33:
            tree = update(tree, batch(rollback.data_step(step)))
            step, tree = rollback.step(step + 1, tree)
        for _ in range(3):
            rollback.request("again")
            step, tree = rollback.step(step + 1, update(tree, batch(rollback.data_step(step))))
            steps.append(step)
    assert steps == sorted(set(steps), reverse=True)


@pytest.mark.parametrize("every", [9, *slowly(5)])
def test_distance_is_bounded_always(tmp_path, every):
    """A fault at any step: never further than max_distance, and normally about half of it."""
    distances = []
    for at in range(10, 50, every):
        _, rollback, _ = run(tmp_path / str(at), at + 5, {at: nan_parameter}, max_distance=12)
        distances += [r.from_step - r.to_step for r in rollback.history]
    assert len(distances) == len(range(10, 50, every))
    assert max(distances) <= 12
    assert np.median(distances) <= 8


def test_nowhere_to_go(tmp_path):
    """Bad batches keep every state from proving healthy, until the last target is too old."""
    bad = dict.fromkeys(range(12, 100, 3), NAN_BATCH)
    with pytest.raises(GuardExhausted, match=r"step 5\d \(parameters\).*within 20 steps.*newest"):
        run(tmp_path, 80, {50: nan_parameter}, bad_batches=bad)
    assert checkpoints_in(tmp_path)  # and the newest good one is in place


def test_an_uncertain_ask_with_nowhere_to_go_is_put_off(tmp_path):
    """Skips alone leave the state whole: the run goes on, and recovers by itself."""
    bad = dict.fromkeys(range(12, 40), NAN_BATCH)
    with pytest.warns(RuntimeWarning, match=r"step 3\d \(skips\), and no state within 20 steps"):
        tree, rollback, _ = run(tmp_path, 140, bad_batches=bad)
    assert rollback.history == []
    assert int(lbw_optax.metrics(tree[1])["rollback_asked"]) == 0
    assert mean_loss(tree) < 1.05 * healthy_loss()


def test_budget(tmp_path):
    faults = dict.fromkeys(range(30, 200, 20), nan_parameter)
    with pytest.raises(GuardExhausted, match=r"budget of 3 in 1000.*32 to \d+ \(parameters"):
        run(tmp_path, 200, faults, max_rollbacks=3)
    journal = json.loads((tmp_path / "journal.json").read_text())
    good = [int(s) for s, state in journal["checkpoints"].items() if state == "good"]
    assert set(good) <= set(checkpoints_in(tmp_path))
    assert good
    with RollbackManager(tmp_path, **QUICK) as rollback:
        assert len(rollback.history) == 3
        step, tree = rollback.resume(start())
    assert_all_finite(tree)
    assert step >= max(good)


# --- checkpoints to resume from ----------------------------------------------------------------


def gaps_of(directory, steps, **options) -> list[int]:
    """Steps that a kill would have lost, at each step of a run."""
    gaps = []

    def watch(rollback, step, tree):
        gaps.append(step - max(checkpoints_in(directory)))

    run(directory, steps, on_step=watch, **options)
    return gaps


def test_an_observed_run_that_once_asked_is_still_saved(tmp_path):
    """What it asks for stays asked for ever."""
    params, state = start()
    state = optax.tree.set(lbw_optax.override(state, mode="observe"), rollback_asked=jnp.int32(4))
    assert max(gaps_of(tmp_path, 100, tree=(params, state))) <= 2 * QUICK["save_every"]
    assert max(checkpoints_in(tmp_path)) >= 96


@pytest.mark.parametrize("period", [3, *slowly(2, 5)])
def test_a_run_with_trouble_again_and_again_is_still_saved(tmp_path, period):
    bad = dict.fromkeys(range(30, 200, period), NAN_BATCH)
    assert max(gaps_of(tmp_path, 120, bad_batches=bad)) <= 2 * QUICK["save_every"]
    assert len(checkpoints_in(tmp_path)) <= 6


def test_trouble_does_not_write_at_every_step(tmp_path, monkeypatch):
    """One more try after the first, and then the cadence."""
    written, save = [], checkpoints.save
    monkeypatch.setattr(
        checkpoints, "save", lambda path, snapshot: (written.append(path), save(path, snapshot))[1]
    )
    bad = dict.fromkeys(range(30, 200, 2), NAN_BATCH)
    run(tmp_path, 110, bad_batches=bad)
    assert len(written) <= 110 // QUICK["save_every"] + 3


def test_a_run_that_is_suspected_for_long_is_still_saved(tmp_path):
    """The loss lies above its level, but not by enough to ask."""

    def suspect(tree):
        return tree[0], optax.tree.set(tree[1], loss_excess=jnp.float32(0.5))

    gaps = gaps_of(tmp_path, 80, faults=dict.fromkeys(range(30, 80), suspect))
    assert max(gaps) <= 2 * QUICK["save_every"]


# --- after a rollback --------------------------------------------------------------------------


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_newer_checkpoints_are_gone_and_the_next_are_written(tmp_path, options):
    on_disk = {}

    def watch(rollback, step, tree):
        if rollback.history and not on_disk:
            on_disk["after"], on_disk["target"] = checkpoints_in(tmp_path), step

    run(tmp_path, 70, {40: nan_parameter}, on_step=watch, **options)
    assert max(on_disk["after"]) <= on_disk["target"]
    assert max(checkpoints_in(tmp_path)) > 60


def test_no_batch_is_used_twice_after_a_rollback(tmp_path):
    faults = {30: nan_parameter, 60: flip_parameter(30)}
    _, rollback, used = run(tmp_path, 90, faults)
    assert len(rollback.history) == 2
    assert used == sorted(set(used))
    skipped = sum(event.skipped_batches for event in rollback.history)
    assert len(used) == 90 + skipped
    assert all(event.skipped_batches <= QUICK["max_distance"] for event in rollback.history)
    # The run that is left has seen every batch of its own once, in order, and jumps over the rest.
    kept = [rollback.data_step(step) for step in range(90)]
    assert kept == sorted(set(kept))
    assert max(np.diff(kept)) <= QUICK["max_distance"] + 1


def test_the_scale_stays_under_a_ceiling_for_a_while(tmp_path):
    scales, before = [], {}

    def watch(rollback, step, tree):
        guard = guard_in(tree[1])
        if not rollback.history:
            before[step] = math.exp(guard.law.control.log_scale)
        else:
            scales.append(math.exp(guard.law.control.log_scale))

    _, rollback, _ = run(tmp_path, 140, {50: nan_parameter}, on_step=watch)
    ceiling = CEILING * before[rollback.history[0].to_step]
    assert max(scales[1 : CEILING_STEPS + 1]) <= ceiling * 1.001
    assert max(scales) > 1.5 * ceiling  # and it is released


def test_a_rollback_is_an_event_and_a_line(tmp_path):
    """The events of the time that was left stay, numbers go on."""
    bad = {35: NAN_BATCH}
    with AuditLog(tmp_path / "audit.jsonl") as audit:

        def record(rollback, step, tree):
            audit.record(step, tree[1])

        tree, rollback, _ = run(
            tmp_path / "r", 70, {40: nan_parameter}, bad_batches=bad, on_step=record
        )
    lines = [json.loads(x) for x in (tmp_path / "audit.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["action"] == "rollback"]
    (event,) = rollback.history
    assert (line["signal"], line["from_step"], line["to_step"]) == (
        event.reason, event.from_step, event.to_step,
    )  # fmt: skip
    rows = [(line, line["number"] + i) for line in lines for i in range(line.get("count", 1))]
    assert [number for _, number in rows] == list(range(len(rows)))  # equal skips share a line
    skip = next(line for line in lines if line["signal"] == "nonfinite_gradients")
    assert skip["number"] < line["number"]
    assert [e.action for e in lbw_optax.events(tree[1])] == [line["action"] for line, _ in rows]


def test_memory_bytes(tmp_path):
    tree = start()
    bytes_of_one = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    most = []
    run(tmp_path / "on", 60, on_step=lambda r, *_: most.append(r.memory_bytes))
    # Four that are proven, since they are small, and one on probation.
    assert bytes_of_one <= max(most) <= 5 * bytes_of_one
    off = []
    run(tmp_path / "off", 60, snapshot_every=None, on_step=lambda r, *_: off.append(r.memory_bytes))
    assert set(off) == {0}


class SlowDisk:
    """Checkpoints that are whole when the test says so, and not before."""

    def __init__(self, monkeypatch):
        self.save, self.begun = checkpoints.save, {}
        monkeypatch.setattr(checkpoints, "save", self.begin)

    def begin(self, path, snapshot):
        wait, may_end = self.save(path, snapshot), threading.Event()
        if path.parent.name != "checkpoints" or snapshot.step == 0:
            return wait
        self.begun[snapshot.step] = may_end
        return lambda: (may_end.wait(), wait())

    def end(self, rollback, step):
        """Let the checkpoint of this step be written, and wait for it."""
        self.begun[step].set()
        rollback._candidates._disk._write()


@pytest.mark.parametrize("options", TIERS.values(), ids=TIERS)
def test_a_checkpoint_is_left_out_while_the_last_is_being_written(tmp_path, monkeypatch, options):
    """The loop goes on, the user is told once, and when the disk is ready the cadence goes on."""
    disk = SlowDisk(monkeypatch)
    with (
        warnings.catch_warnings(record=True) as caught,
        RollbackManager(tmp_path, **(QUICK | options)) as rollback,
    ):
        warnings.simplefilter("always")
        step, tree = rollback.resume(start())
        while step < 60:
            if step == 35:
                disk.end(rollback, 8)
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
        assert list(disk.begun) == [8, 40]
        left_out = rollback._candidates._disk.left_out
        disk.end(rollback, 40)
    assert left_out == 3 + 2  # 16, 24, 32; 48, 56
    (said,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert re.search(
        r"of step 8 is still being written to .* after \S+ s, so that of step 16", said
    )
    assert_same_bits(tree, plain(60))
    with RollbackManager(tmp_path, **QUICK) as rollback:
        step, tree = rollback.resume(start())
    assert step == 40
    assert_same_bits(tree, plain(40))


def test_a_rollback_waits_for_what_it_goes_back_to(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    with RollbackManager(tmp_path, **(QUICK | TIERS["disk"])) as rollback:
        step, tree = rollback.resume(start())
        while step < 14:
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
        disk.begun[8].set()  # it may end now, and nobody has looked
        rollback.request("by hand")
        step, tree = rollback.step(15, update(tree, batch(step)))
    assert step == 8
    assert_same_bits(tree[0], plain(8)[0])


def test_a_write_that_fails_is_told_when_it_has_ended(tmp_path, monkeypatch):
    """And not when the next one is due, which may be a long time after."""

    def fail(path, snapshot):
        return save(path, snapshot) if snapshot.step == 0 else [].pop

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", fail)
    with RollbackManager(tmp_path, **(QUICK | {"save_every": 20})) as rollback:
        step, tree = rollback.resume(start())
        while step < 21:
            if step == 20:
                with contextlib.suppress(IndexError):
                    rollback._candidates._disk._write()
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
        with pytest.warns(
            RuntimeWarning, match="of step 20 could not be written .* after 20 steps"
        ):
            rollback.step(step + 1, update(tree, batch(step)))


# --- when checkpoints are due --------------------------------------------------------------------


def saved_in(directory, steps, **options) -> list[int]:
    """Steps whose checkpoints a run has begun to write."""
    with RollbackManager(directory, **options) as rollback:
        disk, saved = rollback._candidates._disk, set()
        step, tree = rollback.resume(start())
        while step < steps:
            if disk._write is not None:
                disk._write()
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
            saved |= set(rollback._journal.checkpoints)
    return sorted(saved)


policies = checkpoints.ocp.training.save_decision_policies
WHEN = {
    "steps": ({"save_every": 500}, []),
    "by_default_no_sooner_than_100_steps": ({"save_every": timedelta(0)}, [100, 200]),
    "minutes": ({}, []),
    "minutes_without_copies_in_memory": ({"snapshot_every": None}, list(range(25, 226, 25))),
    "policy_interval": ({"save_every": policies.FixedIntervalPolicy(90)}, [90, 180]),
    "policy_steps": ({"save_every": policies.SpecificStepsPolicy([7, 60, 150])}, [7, 60, 150]),
}


@pytest.mark.parametrize(("options", "expected"), WHEN.values(), ids=WHEN)
def test_when_checkpoints_are_due(tmp_path, options, expected):
    assert saved_in(tmp_path, 230, **options) == [0, *expected]


def test_a_policy_that_saves_whenever_the_disk_is_free(tmp_path, monkeypatch):
    """It is told that a write goes on, so none is left out."""
    disk = SlowDisk(monkeypatch)
    policy = policies.ContinuousCheckpointingPolicy()
    with RollbackManager(tmp_path, save_every=policy) as rollback:
        step, tree = rollback.resume(start())
        while step < 30:
            if step == 20:
                disk.end(rollback, 1)
            step, tree = rollback.step(step + 1, update(tree, batch(step)))
        assert list(disk.begun) == [1, 22]
        disk.end(rollback, 22)


def test_the_processes_agree_that_time_is_up():
    """By the clock of any of them, and no sooner than 100 steps after the one before."""
    time = cadence.of(timedelta(minutes=5), most=None)
    assert [time.time_is_up(seconds) for seconds in (0, 299, 300)] == [False, False, True]
    for since, is_up, due in ((99, True, False), (100, True, True), (10**6, False, False)):
        assert time.is_due(cadence.Now(10**6, since, is_up, False)) == due


def test_checkpoints_are_not_compressed(tmp_path):
    """Zeros would shrink to nothing: the bytes on disk tell."""
    zeros = jnp.zeros(100_000), lbw_optax.lbw_guard(optax.sgd(0.1)).init(jnp.zeros(100_000))
    with RollbackManager(tmp_path) as rollback:
        rollback.resume(zeros)
    written = sum(path.stat().st_size for path in tmp_path.glob("checkpoints/0/**/*"))
    assert written >= 400_000


# --- what a user may get wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"max_distance": 27, "save_every": 25, "snapshot_every": None},
            "max_distance=27 is too small for save_every=25 and probation=2",
        ),
        (
            {"save_every": policies.FixedIntervalPolicy(3), "snapshot_every": None},
            "what FixedIntervalPolicy says keeps no max_distance: give save_every in steps",
        ),
        ({"save_every": timedelta(-1)}, "save_every must be no time before now"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"snapshot_every": 48}, "max_distance=50 is too small for snapshot_every=48"),
        ({"probation": 0}, "probation must be at least 1, got 0"),
        ({"max_rollbacks": 0}, "max_rollbacks must be at least 1, got 0"),
        ({"save_every": 25.5}, "save_every must be an integer, for steps, .* got 25.5"),
        ({"save_every": None}, "save_every must be an integer, for steps, .* got None"),
        ({"snapshot_every": True}, "snapshot_every must be an integer, got True"),
        ({"snapshot_every": np.zeros(2)}, r"snapshot_every must be an integer, got array"),
        ({"max_distance": math.nan}, "max_distance must be an integer, got nan"),
        ({"probation": "2"}, "probation must be an integer, got '2'"),
    ],
)
def test_arguments(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        RollbackManager(tmp_path, **options)


@pytest.mark.parametrize("directory", [None, 5, b"run"])
@pytest.mark.parametrize(
    "use",
    [RollbackManager, lbw_optax.AuditLog, orders.Orders, lambda d: orders.give(d, "hold")],
    ids=["rollback", "audit", "orders", "give"],
)
def test_what_is_no_path(directory, use):
    with pytest.raises(TypeError, match=r"must be a path, a str or a pathlib\.Path, got"):
        use(directory)


def test_a_state_without_a_guard(tmp_path):
    params = {"w": jnp.ones(3)}
    with RollbackManager(tmp_path) as rollback, pytest.raises(ValueError, match="holds no guard"):
        rollback.resume((params, optax.adamw(1e-3).init(params)))
    with RollbackManager(tmp_path) as rollback, pytest.raises(ValueError, match="holds no guard"):
        rollback.step(1, params)


def test_a_leaf_that_is_no_array(tmp_path):
    with RollbackManager(tmp_path) as rollback, pytest.raises(TypeError, match=r"\['name'\].*str"):
        rollback.resume((start(), {"name": "run 7"}))


def test_adopt_and_strip_through_a_chain():
    params = {"w": jnp.ones(3), "b": jnp.zeros(2)}
    inner = optax.adamw(1e-3)
    guarded = optax.chain(optax.clip(1.0), lbw_optax.lbw_guard(inner))
    bare = optax.chain(optax.clip(1.0), inner)
    _, old = bare.update(params, bare.init(params), params)
    adopted = lbw_optax.adopt(guarded.init(params), old)
    assert_same_bits(lbw_optax.strip(adopted), old)
    assert jax.tree.structure(adopted) == jax.tree.structure(guarded.init(params))
    with pytest.raises(ValueError, match="not what this optimizer holds without its guard"):
        lbw_optax.adopt(guarded.init(params), optax.sgd(0.1).init(params))


def test_what_a_person_has_ordered_outlives_a_rollback(tmp_path):
    """A pinned scale and a mode are no part of what is gone back to."""

    with Patient(tmp_path, **QUICK) as rollback:
        step, (params, state) = rollback.resume(start())
        while step < 40:
            params, state = update((params, state), batch(rollback.data_step(step)))
            if step == 24:
                state = lbw_optax.override(state, scale=0.05, mode="observe")
                rollback.request("by hand")
            step, (params, state) = rollback.step(step + 1, (params, state))
            if rollback.history:
                break
    guard = guard_in(state)
    assert step < 25
    assert bool(guard.law.control.pinned)
    assert float(lbw_optax.metrics(state)["scale"]) == pytest.approx(0.05)
    assert int(guard.mode) == Mode.OBSERVE

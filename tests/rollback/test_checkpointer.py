"""Rollbacks from a team's own Orbax manager, of either API: real objects, real files."""

import contextlib
import gc
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from rollback_loop import Patient, batch, in_moment, nan_parameter, start, update
from support import assert_same_bits, environment, free_port

from lbw_optax import GuardExhausted, RollbackManager

ocp = pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
from orbax.checkpoint import checkpoint_managers as policies  # noqa: E402
from team_managers import V0, V1  # noqa: E402

EVERY_1, EVERY_10 = (policies.FixedIntervalPolicy(n) for n in (1, 10))
KINDS = pytest.mark.parametrize("kind", [V0, V1])
nan_moment = in_moment("nu", lambda x: x.at[0, 0].set(jnp.nan))

# When one read of a damaged checkpoint fails, Orbax leaves the others to end after their event
# loop has: Python says so when it collects them, and it does that in this module.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _collected_here():
    yield
    gc.collect()


@contextlib.contextmanager
def opened(kind, directory, keep=3, save=EVERY_10, **options):
    """The team's manager and ours on it."""
    team = kind(directory, save, policies.LatestN(keep))
    options = {"snapshot_every": None, **options}
    with team.manager, RollbackManager(checkpointer=team.manager, **options) as rollback:
        yield team, rollback


def train(team, rollback, steps, faults=None, *, saves_first=True, save=None, tree=None):
    """The loop of a team, which saves before it hands a state in, or after."""
    pending, save = dict(faults or {}), save or team.save
    step, tree = rollback.resume(start() if tree is None else tree)
    while step < steps:
        tree = update(tree, batch(rollback.data_step(step)))
        made = step + 1
        tree = pending.pop(made, lambda x: x)(tree)
        if saves_first:
            save(made, tree)
        step, tree = rollback.step(made, tree)
        if not saves_first and step == made:  # or it is there: v1 refuses to save it again
            save(step, tree)
    return tree


def run(kind, directory, steps, faults=None, *, saves_first=True, **options):
    with opened(kind, directory, **options) as (team, rollback):
        tree = train(team, rollback, steps, faults, saves_first=saves_first)
        return tree, rollback, team.steps()


def of_our_own(directory, steps, faults=None):
    """The same run with checkpoints that `RollbackManager` itself writes, at the same steps."""
    options = {"snapshot_every": None, "save_every": 10}
    with Patient(directory, **options) as rollback:
        return train(None, rollback, steps, faults, save=lambda *_: None), rollback


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """By the step of the fault: the state after 52 steps, and the manager."""
    made = {at: tmp_path_factory.mktemp(f"own-{at}") for at in (33, 30)}
    return {at: of_our_own(path, 52, {at: nan_parameter}) for at, path in made.items()}


@pytest.mark.parametrize(
    ("kind", "saves_first", "at", "target"),
    [(V0, True, 33, 30), (V0, False, 30, 20), (V1, True, 30, 20), (V1, False, 33, 30)],
)
def test_it_goes_back_to_the_teams_newest_proven_state(
    tmp_path, own, kind, saves_first, at, target
):
    """To the bit what checkpoints of our own give; a broken one is deleted, and written anew."""
    (whole, by_own), faults = own[at], {at: nan_parameter}
    tree, rollback, steps = run(kind, tmp_path / "team", 52, faults, saves_first=saves_first)
    assert [(r.to_step, r.reason, r.tier) for r in rollback.history] == [
        (target, "parameters", "disk")
    ]
    assert rollback.history == by_own.history
    assert_same_bits(tree, whole)
    assert steps == [30, 40, 50]  # by the team's policy: the newest three
    assert rollback.data_step(51) == by_own.data_step(51) > 51
    assert sorted(x.name for x in tmp_path.iterdir()) == ["team", "team.rollback"]


@KINDS
def test_memory_is_nearer_and_what_is_newer_is_left(tmp_path, kind):
    """Only what this run has saved after the target goes; nothing else of theirs is touched."""
    with opened(kind, tmp_path / "team", snapshot_every=4, keep=9) as (team, rollback):
        train(team, rollback, 31, {29: nan_parameter})
        assert [(r.to_step, r.tier) for r in rollback.history] == [(24, "memory")]
        assert team.steps() == [10, 20, 30]  # 30 is of the way that was gone again
        assert "checkpoints after what your" in str(rollback.report())
        with pytest.raises(ValueError, match=r"was given a checkpointer, .*: save with that one"):
            rollback.save(31, start())


def test_what_their_policy_deletes_is_no_target_and_nothing_is_beyond_the_distance(tmp_path):
    """The newest proven one is 20 steps old, and older ones are gone: a certain reason ends it."""
    with opened(V0, tmp_path / "team", keep=1, max_distance=12) as (team, rollback):
        with pytest.raises(GuardExhausted, match=r"no state within 12 steps .*/team is of step 30"):
            train(
                team, rollback, 62, {45: nan_parameter}, save=lambda s, t: s > 30 or team.save(s, t)
            )
        assert team.steps() == [30]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import team_managers
from rollback_loop import nan_parameter, start
import test_checkpointer as here

kind = getattr(team_managers, sys.argv[1])
def save(step, tree):
    team.save(step, tree)
    if step == 45:
        team.steps()
        os.kill(os.getpid(), signal.SIGKILL)
with here.opened(kind, Path(sys.argv[2])) as (team, rollback):
    here.train(team, rollback, 99, {33: nan_parameter}, save=save)
"""


@pytest.mark.process
@KINDS
def test_a_run_that_is_killed_goes_on_as_the_one_that_was_not(tmp_path, own, kind):
    """With its rollback, its batches, and what has proven healthy."""
    whole, by_own = own[33]
    here = Path(__file__).parent
    arguments = [kind.__name__, tmp_path / "team", here, here.parent]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], env=environment(), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with opened(kind, tmp_path / "team") as (team, rollback):
        assert json.loads((tmp_path / "team.rollback/journal.json").read_text())["checkpoints"] == {
            "20": "good",
            "30": "good",
            "40": "good",
        }
        tree = train(team, rollback, 52)
        assert rollback.history == by_own.history
        assert team.steps() == [30, 40, 50]
    assert_same_bits(tree, whole)


@KINDS
def test_a_kill_right_after_a_rollback_deletes_what_was_to_be_deleted(tmp_path, kind):
    """The journal drops a checkpoint before it is deleted."""
    run(kind, tmp_path / "team", 34)
    journal = tmp_path / "team.rollback" / "journal.json"
    content = json.loads(journal.read_text())
    content["checkpoints"].pop("30")
    journal.write_text(json.dumps(content | {"dropped": [30]}))
    with opened(kind, tmp_path / "team") as (team, rollback):
        step, _ = rollback.resume(start())
        assert step == 20
        assert team.steps() == [10, 20]
    assert json.loads(journal.read_text())["dropped"] == []


@KINDS
def test_a_checkpoint_that_cannot_be_restored_is_passed_over_and_left(tmp_path, kind):
    run(kind, tmp_path / "team", 34)
    for part in (tmp_path / "team" / "30").rglob("*"):
        if part.is_file() and "d" in part.parts:
            part.write_bytes(part.read_bytes()[:-9])
    with opened(kind, tmp_path / "team") as (team, rollback):
        with pytest.warns(RuntimeWarning, match="Resumed from step 20 .* They are not deleted"):
            step, _ = rollback.resume(start())
        assert step == 20
        assert team.steps() == [10, 20, 30]


@KINDS
def test_checkpoints_from_before_there_was_a_manager_of_ours(tmp_path, kind):
    """The newest is gone on from, and proves itself; older ones are never gone back to."""
    run(kind, tmp_path / "team", 34)
    shutil.rmtree(tmp_path / "team.rollback")
    with opened(kind, tmp_path / "team") as (team, rollback):
        with pytest.warns(RuntimeWarning, match="from step 30, and none before it is gone back"):
            train(team, rollback, 38, {34: nan_parameter})
        assert [r.to_step for r in rollback.history] == [30]
        assert team.steps() == [10, 20, 30]


@pytest.mark.parametrize(
    ("as_step", "broken", "said"),
    [
        (30, nan_moment, r"step 30 is passed over: there is a NaN in 1.inner_state.0.nu.w"),
        (29, lambda x: x, r"step 29 is passed over: its guard has seen 30 .* as step 29, 29: save"),
    ],
)
def test_a_state_that_is_none_to_go_back_to(tmp_path, as_step, broken, said):
    """With a NaN that the guard has not seen; and under another number of updates."""
    with opened(V0, tmp_path / "team", snapshot_every=8) as (team, rollback):

        def save(step, tree):
            if step == 30:
                made = ocp.args.StandardSave(broken(tree))
                team.manager.save(as_step, args=made, force=True)

        train(team, rollback, 33, save=save)
        rollback.request("to see")
        with pytest.warns(RuntimeWarning, match=said):
            step, _ = rollback.step(34, start())
    assert step == 24


@pytest.mark.parametrize("count", [lambda step: 4 * step, lambda step: step // 10])
@KINDS
def test_what_is_saved_under_another_count_is_left_alone(tmp_path, kind, count):
    """As of batches or epochs: healthy checkpoints from before the target would be deleted for
    their number, or a state of many updates be gone on from as one of few."""
    with opened(kind, tmp_path / "team", snapshot_every=4, keep=9, save=EVERY_1) as (
        team,
        rollback,
    ):

        def save(step, tree):
            if step % 10 == 0 and step <= 20:
                team.save(count(step), tree)

        with pytest.warns(
            RuntimeWarning, match=r"has saved step \d+ while .* was of step 10: what"
        ):
            train(team, rollback, 36, {29: nan_parameter}, save=save)
        assert [(r.to_step, r.tier) for r in rollback.history] == [(24, "memory")]
        assert team.steps() == [count(10), count(20)]


def test_other_arguments_and_several_items(tmp_path, own):
    """As their save, so their restore: of a Composite, with another item that is not ours."""

    def save(step, tree):
        parts = {"params": tree[0], "opt": tree[1]}
        items = {name: ocp.args.PyTreeSave(x) for name, x in parts.items()}
        team.manager.save(
            step, args=ocp.args.Composite(data=ocp.args.JsonSave({"at": step}), **items)
        )

    def restore(step, abstract):
        items = {
            name: ocp.args.PyTreeRestore(
                item=x, restore_args=ocp.checkpoint_utils.construct_restore_args(x)
            )
            for name, x in zip(("params", "opt"), abstract, strict=True)
        }
        found = team.manager.restore(step, args=ocp.args.Composite(**items))
        return found["params"], found["opt"]

    for steps in (45, 52):
        with opened(V0, tmp_path / "team", restore=restore) as (team, rollback):
            tree = train(
                team, rollback, steps, {33: nan_parameter} if steps == 45 else {}, save=save
            )
            assert [r.to_step for r in rollback.history] == [30]
    assert_same_bits(tree, own[33][0])
    with (
        opened(V0, tmp_path / "team") as (team, rollback),
        pytest.raises(ValueError, match=r"can be restored .* pass restore=lambda step, abs"),
    ):
        rollback.resume(start())


def test_arguments(tmp_path):
    with opened(V0, tmp_path / "team") as (team, _):
        theirs = {"checkpointer": team.manager}
        for options, said in (
            (theirs | {"directory": tmp_path}, r"or a checkpointer, .* not both"),
            (theirs | {"save_every": 5}, "when yours are due is up to your"),
            (theirs | {"restore": 5}, "restore must be a function from a step"),
            (theirs | {"snapshot_every": 60}, "max_distance=50 is too small"),
            ({"checkpointer": tmp_path}, "must be an orbax.checkpoint.CheckpointManager, or a"),
            ({"directory": tmp_path, "restore": min}, "pass checkpointer=, too"),
        ):
            with pytest.raises(ValueError, match=said):
                RollbackManager(**options)
        with pytest.raises(TypeError, match="your own pass checkpointer="):
            RollbackManager()
        with pytest.raises(OSError, match=r"Another process uses .*team.rollback"):
            RollbackManager(**theirs)
    (tmp_path / "other.rollback").write_text("a file")
    with (
        V0(tmp_path / "other", EVERY_10, None).manager as manager,
        pytest.raises(OSError, match=r"other.rollback \(Not a directory\): it lies beside"),
    ):
        RollbackManager(checkpointer=manager)


WORKER = """
import sys
import jax
rank, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import checkpoint_managers as policies
import lbw_optax

everywhere = NamedSharding(jax.make_mesh((2,), ("data",)), P())
tx = lbw_optax.adamw(0.03)
params = jax.device_put(jnp.ones((4, 2)), everywhere)
state = jax.jit(lambda p: (p, tx.init(p)), out_shardings=everywhere)(params)
broken = jax.jit(lambda s: (s[0] * jnp.nan, s[1]), out_shardings=everywhere)

@jax.jit
def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p - x) ** 2))(params)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return optax.apply_updates(params, updates), opt_state

options = ocp.CheckpointManagerOptions(
    save_decision_policy=policies.FixedIntervalPolicy(10),
    preservation_policy=policies.LatestN(3),
)
with (
    ocp.CheckpointManager(directory + "/team", options=options) as manager,
    lbw_optax.RollbackManager(checkpointer=manager, snapshot_every=None) as rollback,
):
    step, state = rollback.resume(state)
    while step < 42:
        x = np.full((4, 2), 2.0 + rollback.data_step(step) % 2, np.float32)
        state = train_step(state, jax.make_array_from_callback(x.shape, everywhere, lambda i: x[i]))
        if step == 29 and not rollback.history:
            state = broken(state)
        manager.save(step + 1, args=ocp.args.StandardSave(state))
        step, state = rollback.step(step + 1, state)
    manager.wait_until_finished()
    print([r[:2] for r in rollback.history], sorted(manager.all_steps()), float(state[0].sum()))
"""


@pytest.mark.process
def test_all_processes_go_back_to_the_same(tmp_path):
    """The broken state of step 30 is deleted by all of them, and saved anew."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, str(tmp_path)],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0].splitlines()[-1] for process in processes]
    assert said[0] == said[1]
    assert said[0].startswith("[(32, 20)] [20, 30, 40] ")
    assert "nan" not in said[0]

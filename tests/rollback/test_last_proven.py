"""Orbax's own managers with our policy: what they save, what they keep, and the way back."""

import contextlib
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rollback_loop import batch, in_moment, nan_parameter, plain, start, update
from support import assert_all_finite, assert_same_bits, environment, free_port

import lbw_optax
from lbw_optax.rollback.last_proven import PATIENCE, LastProven

ocp = pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
from orbax.checkpoint import checkpoint_managers as policies  # noqa: E402
from team_managers import V0, V1  # noqa: E402

EVERY_10 = policies.FixedIntervalPolicy(10)
BAD = (np.full((16, 4), np.nan, np.float32), np.zeros((16, 3), np.float32))


@contextlib.contextmanager
def opened(kind, directory, proven, save=None, preserve=None):
    team = kind(directory, save or proven, preserve or proven)
    with team.manager:
        yield team


def train(team, proven, steps, tree=None, *, begin=0, bad=(), faults=None):
    """From `begin` to `steps`, saving when the team's manager does; the state and what it saved."""
    tree, saved = start() if tree is None else tree, []
    for step in range(begin + 1, steps + 1):
        tree = update(tree, BAD if step in bad else batch(step - 1))
        tree = (faults or {}).get(step, lambda x: x)(tree)
        proven.update(step, tree)
        if team.save(step, tree):
            saved.append(step)
    return tree, saved


@pytest.mark.parametrize("kind", [V0, V1])
def test_a_sound_run_keeps_the_last_proven_and_the_newest(tmp_path, kind):
    proven = LastProven(EVERY_10)
    with opened(kind, tmp_path, proven) as team:
        tree, saved = train(team, proven, 45)
        assert saved == [10, 20, 30, 40]
        assert team.steps() == [30, 40]
        assert proven.last == 40
        assert_same_bits(team.load(40, start()), plain(40))
    assert_same_bits(tree, plain(45))


@pytest.mark.parametrize("kind", [V0, V1])
def test_back_to_the_last_proven_state_and_on(tmp_path, kind):
    """The parameters break right after step 30 was saved: it is no state to go back to."""
    proven = LastProven(EVERY_10)
    with opened(kind, tmp_path, proven) as team:
        train(team, proven, 34, faults={31: nan_parameter})
        assert proven.asked == "the parameters are broken"
        assert team.steps() == [20, 30]
        assert proven.last == 20
        for step in team.steps():
            if step > proven.last:
                team.manager.delete(step)
        tree, saved = train(team, proven, 45, team.load(20, start()), begin=20)
        assert saved == [30, 40]
        assert proven.asked == ""
        assert proven.last == 40
    assert_same_bits(tree, plain(45))


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({20}, [10, 21, 30]),
        ({19}, [10, 20, 30]),  # the step before: its weights and the next gradient are sound
        ({20, 21, 22}, [10, 23, 30]),
        ({10, 20, 30}, [11, 21, 31]),
    ],
)
def test_a_checkpoint_that_is_due_waits_for_a_healthy_state(tmp_path, bad, expected):
    proven = LastProven(EVERY_10)
    with opened(V0, tmp_path, proven) as team:
        _, saved = train(team, proven, 34, bad=bad)
        team.steps()
    assert saved == expected


def test_trouble_within_the_probation_fails_a_checkpoint_and_later_trouble_does_not(tmp_path):
    proven = LastProven(EVERY_10, probation=4)
    with opened(V0, tmp_path, proven) as team:
        tree, _ = train(team, proven, 16, bad={15})
        assert proven.last == 10
        tree, _ = train(team, proven, 26, tree, begin=16, bad={23})
        assert proven.last == 10
        assert team.steps() == [10, 20]
        train(team, proven, 30, tree, begin=26)
        assert team.steps() == [10, 30]  # 20 has failed


def test_a_nan_in_the_optimizer_is_not_saved(tmp_path):
    """It came after the update, so the guard's own numbers do not show it yet."""
    proven = LastProven(EVERY_10)
    nan = in_moment("nu", lambda x: x.at[0, 0].set(jnp.nan))
    with opened(V0, tmp_path, proven) as team:
        _, saved = train(team, proven, 11, faults={10: nan})
        assert saved == []
        assert proven.asked == "" or "broken" in proven.asked


def test_a_new_process_deletes_nothing_before_it_has_a_proven_state(tmp_path):
    first = LastProven(EVERY_10)
    with opened(V0, tmp_path, first, preserve=policies.LatestN(9)) as team:
        tree, _ = train(team, first, 32)
    second = LastProven(EVERY_10)
    with opened(V0, tmp_path, second) as team:
        assert second.last is None
        like = team.load(30, start())
        tree, _ = train(team, second, 40, like, begin=30, bad={31})
        assert team.steps() == [10, 20, 40]  # 30 failed; the others are of another process
        train(team, second, 50, tree, begin=40)
        assert team.steps() == [40, 50]
        assert second.last == 40


def test_it_goes_with_policies_of_orbax(tmp_path):
    """Saved and kept what any of them says; a forced save is judged like the others."""
    proven = LastProven(EVERY_10)
    save = policies.AnySavePolicy([proven, policies.SpecificStepsPolicy({7, 13})])
    preserve = policies.AnyPreservationPolicy([proven, policies.EveryNSteps(7)])
    with opened(V0, tmp_path, proven, save, preserve) as team:
        tree, saved = train(team, proven, 14, bad={13})
        assert saved == [7, 10, 13]
        assert proven.last == 10
        train(team, proven, 33, tree, begin=14)
        assert team.steps() == [7, 20, 30]
        assert proven.last == 30


def test_a_run_in_which_nobody_answers_is_told_that_nothing_is_saved(tmp_path):
    proven = LastProven(EVERY_10)
    with (
        opened(V0, tmp_path, proven) as team,
        pytest.warns(RuntimeWarning, match="No checkpoint was saved since step 20") as said,
    ):
        _, saved = train(team, proven, 2 * PATIENCE + 30, faults={15: nan_parameter})
    assert saved == [10]
    assert len(said) == 1
    assert "the parameters are broken" in str(said[0].message)
    assert "last proven one (10)" in str(said[0].message)


def test_newer_checkpoints_that_are_left_lying_are_named(tmp_path):
    """Orbax saves nothing below its newest step, and says nothing."""
    proven = LastProven(EVERY_10)
    with opened(V0, tmp_path, proven) as team:
        train(team, proven, 34, faults={31: nan_parameter})
        with pytest.warns(RuntimeWarning, match=r"steps \[30\] are of a run that was left") as said:
            _, saved = train(team, proven, 45, team.load(20, start()), begin=20)
        assert saved == [40]
        assert len(said) == 1
        assert proven.last == 40


def ask_for_the_loss(tree):
    params, state = tree
    divergence = state.law.divergence._replace(rollback_asked=jnp.int32(4))
    return params, state._replace(law=state.law._replace(divergence=divergence))


@pytest.mark.parametrize(("reasons", "expected"), [({}, [10]), ({"reasons": ["skips"]}, [10, 20])])
def test_reasons_that_are_not_answered(tmp_path, reasons, expected):
    proven = LastProven(EVERY_10, **reasons)
    with opened(V0, tmp_path, proven) as team:
        _, saved = train(team, proven, 24, faults={15: ask_for_the_loss})
        team.steps()
    assert saved == expected


def test_a_guard_that_observes_withholds_nothing(tmp_path):
    params, state = start()
    tree, proven = (params, lbw_optax.override(state, mode="observe")), LastProven(EVERY_10)
    with opened(V0, tmp_path, proven) as team:
        _, saved = train(team, proven, 32, tree, faults={20: ask_for_the_loss})
        assert proven.asked == ""
        assert proven.last == 10  # it is judged all the same
        team.steps()
    assert saved == [10, 20, 30]


@pytest.mark.parametrize("back_to", [20, 23])
def test_a_checkpoint_of_the_step_that_is_gone_back_to_stays_proven(tmp_path, back_to):
    """As when it is handed in before another update, which a `RollbackManager` makes possible."""
    proven = LastProven(EVERY_10)
    with opened(V0, tmp_path, proven) as team:
        train(team, proven, 34)
        team.steps()
        team.manager.delete(30)
        tree = plain(back_to)
        proven.update(back_to, tree)
        assert proven.last == 20
        _, saved = train(team, proven, 41, tree, begin=back_to)
        assert saved == [30, 40]
        assert team.steps() == [30, 40]


def test_beside_a_rollback_manager(tmp_path):
    """It goes back from memory; the team's manager has the checkpoints to resume from."""
    proven, tree = LastProven(EVERY_10), start()
    with (
        opened(V0, tmp_path / "theirs", proven) as team,
        lbw_optax.RollbackManager(tmp_path / "ours", save_every=10**6, snapshot_every=4) as back,
    ):
        step, tree = back.resume(tree)
        while step < 45:
            tree = update(tree, batch(back.data_step(step)))
            if step == 31 and not back.history:
                tree = nan_parameter(tree)
            made = step + 1
            step, tree = back.step(made, tree)
            if step < made:
                for newer in [x for x in team.steps() if x > step]:
                    team.manager.delete(newer)
            proven.update(step, tree)
            team.save(step, tree)
        assert [(r.to_step, r.reason) for r in back.history] == [(28, "parameters")]
        assert team.steps() == [30, 40]
        assert proven.last == 40
    assert_all_finite(tree)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((100,), {}, "when must be a SaveDecisionPolicy of Orbax"),
        ((EVERY_10,), {"probation": 0}, "probation must be an integer of at least 1, got 0"),
        ((EVERY_10,), {"reasons": ["los"]}, "reasons must be a collection of names out of"),
    ],
)
def test_arguments(arguments, options, said):
    with pytest.raises(ValueError, match=said):
        LastProven(*arguments, **options)


def test_the_state_that_a_run_starts_from_is_saved_when_it_is_due(tmp_path):
    proven = LastProven(EVERY_10)
    with opened(V0, tmp_path, proven) as team:
        proven.update(0, start())
        assert team.save(0, start())
        train(team, proven, 3)
        assert team.steps() == [0]
        assert proven.last == 0


def test_it_must_be_given_every_state(tmp_path):
    proven = LastProven(EVERY_10)
    with (
        opened(V0, tmp_path, proven) as team,
        pytest.raises(ValueError, match="asked to save step 10 and was given step None: call upd"),
    ):
        team.save(10, start())
    with pytest.raises(ValueError, match="holds no guard"):
        proven.update(1, optax.adam(1e-3).init(jnp.ones(2)))


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
from lbw_optax.callback import TrainGuard
from lbw_optax.orders import give
from lbw_optax.rollback.last_proven import LastProven

mesh = jax.make_mesh((2,), ("data",))
everywhere = NamedSharding(mesh, P())
tx = lbw_optax.adamw(0.03)
params = jax.device_put(jnp.ones((4, 2)), everywhere)
state = jax.jit(lambda p: (p, tx.init(p)), out_shardings=everywhere)(params)

@jax.jit
def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p - x) ** 2))(params)
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return optax.apply_updates(params, updates), opt_state

proven = LastProven(policies.FixedIntervalPolicy(10))
options = ocp.CheckpointManagerOptions(save_decision_policy=proven, preservation_policy=proven)
saved = []
with (
    ocp.CheckpointManager(directory + "/checkpoints", options=options) as manager,
    TrainGuard(directory, every=10) as guard,
):
    step, state = guard.on_restore(0, state)
    while step < 45:
        x = np.full((4, 2), np.nan if step in (19, 20) else 2.0 + step % 2, np.float32)
        state = train_step(state, jax.make_array_from_callback(x.shape, everywhere, lambda i: x[i]))
        if step == 30 and rank == 0:
            give(directory, "hold", 0.25)
        step, state = guard.on_step(step + 1, state)
        proven.update(step, state)
        if manager.save(step, args=ocp.args.StandardSave(state)):
            saved.append(step)
    manager.wait_until_finished()
    print(saved, sorted(manager.all_steps()), proven.last, guard.on_save(step, state))
    print(float(lbw_optax.metrics(state)["scale"]))
"""


@pytest.mark.process
def test_all_processes_save_the_same(tmp_path):
    """Beside the three calls, of which the first process alone writes."""
    port = str(free_port())
    command = [sys.executable, "-c", WORKER]
    processes = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path)],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0].splitlines()[-2:] for process in processes]
    assert said[0] == said[1] == ["[10, 22, 30, 40] [30, 40] 40 True", "0.25"]
    actions = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [x["step"] for x in actions if x["action"] == "skip"] == [19]
    assert [x["order"] for x in actions if x["action"] == "order"] == ["hold"]

"""Three calls around a loop: they change nothing of a sound run, and miss nothing of another."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_same_bits, gradients_of, guard_in, guarded, loss_of, small_params

import lbw_optax
from lbw_optax.callback import TrainGuard
from lbw_optax.exporters import PrometheusFile
from lbw_optax.orders import give
from lbw_optax.report import report
from train.jsonl import read

RUN = guarded("sgd_momentum")


def first():
    params = small_params()
    return params, RUN.init(params)


def train_step(state, *, is_bad=False):
    params, opt_state = state
    gradients, loss = gradients_of(params), np.float32(loss_of(params))
    if is_bad:
        gradients = jax.tree.map(lambda g: g * np.float32(np.nan), gradients)
    return RUN.step(params, opt_state, gradients, loss)


def loop(guard, steps, *, bad=(), begin=0, state=None, change=lambda step, state: state):
    """As a user writes it, with a hook for what happens to the run."""
    step, state = guard.on_restore(begin, first() if state is None else state)
    while step < steps:
        state = train_step(state, is_bad=guard.data_step(step) in bad)
        step, state = guard.on_step(step + 1, change(step + 1, state))
    return state


def test_a_sound_run_is_the_run_without(tmp_path):
    state = first()
    for _ in range(120):
        state = train_step(state)
    with TrainGuard(tmp_path / "runs" / "mine") as guard:
        assert_same_bits(loop(guard, 120), state)
        assert guard.on_save(120, state)
    log = read(tmp_path / "runs" / "mine" / "log.jsonl")
    assert [line["step"] for line in log] == [50, 100, 120]
    assert {"loss", "scale", "regime", "gradient_norm", "time"} <= log[0].keys()


def test_what_the_guard_does_is_written_told_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lbw_optax")
    told = []
    with TrainGuard(tmp_path, every=10, on_event=told.append) as guard:
        state = loop(guard, 40, bad={14, 15, 31})
    written = [x for x in read(tmp_path / "events.jsonl") if x["action"] == "skip"]
    assert [(x["step"], x.get("count")) for x in written] == [(14, 2), (31, None)]
    assert [x.line["step"] for x in told if x.line["action"] == "skip"] == [14, 31]
    assert [x.sentence for x in told] == [
        r.getMessage() for r in caplog.records if r.getMessage().startswith("Step ")
    ]
    assert lbw_optax.explain(state) == caplog.records[-1].getMessage()
    text = report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "gradients are not finite" in text


def test_an_exhausted_guard_stops_the_run_with_an_alert(tmp_path):
    told = []
    with (
        TrainGuard(tmp_path, every=20, on_event=told.append) as guard,
        pytest.raises(lbw_optax.GuardExhausted, match="45 skipped in all") as raised,
    ):
        loop(guard, 200, bad=range(35, 200))
    assert told[-1].level == "error"
    assert told[-1].sentence == str(raised.value)
    assert told[-1].step == 80  # the first look after step 35 + 30
    assert read(tmp_path / "events.jsonl")[-1]["action"] == "skip"


def test_an_order_is_obeyed_at_the_next_step(tmp_path):
    scales = {}

    def change(step, state):
        if step == 20:
            give(tmp_path, "hold", 0.25)
        scales[step] = float(lbw_optax.metrics(state)["scale"])
        return state

    with TrainGuard(tmp_path) as guard:
        loop(guard, 23, change=change)
    assert scales[20] != 0.25
    assert scales[21] == scales[22] == 0.25
    (order,) = [x for x in read(tmp_path / "events.jsonl") if x["action"] == "order"]
    assert (order["order"], order["step"]) == ("hold", 20)


def test_a_run_that_goes_on_from_its_own_checkpoint(tmp_path):
    """What it does again differently is written anew, and its place is where it was."""
    with TrainGuard(tmp_path, every=5) as guard:
        kept = loop(guard, 10, bad={3})
        loop(guard, 20, bad={12}, begin=10, state=kept)
    with TrainGuard(tmp_path, every=5) as guard:
        loop(guard, 20, bad={14}, begin=10, state=kept)
    lines = [x for x in read(tmp_path / "events.jsonl") if x["action"] in ("skip", "restored")]
    assert [(x["action"], x.get("step")) for x in lines] == [
        ("skip", 3),
        ("skip", 12),
        ("restored", None),
        ("skip", 14),
    ]


def asks(state):
    params, opt_state = state
    guard = guard_in(opt_state)
    law = guard.law._replace(divergence=guard.law.divergence._replace(rollback_asked=jnp.int32(4)))
    return params, guard._replace(law=law)


def test_what_is_asked_and_not_answered_is_told_once(tmp_path):
    """And once more when it is asked again after an answer."""
    change = {12: asks, 33: lbw_optax.reset, 41: asks}
    told = []
    with TrainGuard(tmp_path, every=10, on_event=told.append) as guard:
        loop(guard, 60, change=lambda step, state: change.get(step, lambda x: x)(state))
    asked = [x for x in told if x.line["action"] == "asks"]
    assert [(x.level, x.step) for x in asked] == [("warning", 20), ("warning", 50)]
    assert "the loss has risen and stays there. RollbackManager answers" in asked[0].sentence


def nan_moment(state):
    trace = optax.tree.get(state, "trace")
    return optax.tree.set(state, trace=trace | {"gain": jnp.full_like(trace["gain"], jnp.nan)})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda state: state, True),
        (lambda state: train_step(state, is_bad=True), False),
        (asks, False),
        (nan_moment, False),
    ],
    ids=["sound", "skipped", "asks", "nan"],
)
def test_on_save_says_whether_a_state_is_one_to_go_back_to(tmp_path, spoil, expected):
    with TrainGuard(tmp_path) as guard:
        state = spoil(loop(guard, 5))
        assert guard.on_save(6, state) == expected


def test_a_state_without_a_step_is_one_to_go_back_to(tmp_path):
    with TrainGuard(tmp_path) as guard:
        assert guard.on_save(*guard.on_restore(0, first()))


def test_metrics_go_where_they_are_wanted(tmp_path, caplog):
    seen = []

    def broken(step, metrics):
        raise ConnectionError("down")

    def see(step, metrics):
        seen.append((step, float(metrics["scale"])))

    prometheus = PrometheusFile(tmp_path / "mine.prom")
    with TrainGuard(tmp_path, every=10, on_metrics=[broken, see, prometheus]) as guard:
        state = loop(guard, 25)
        guard.on_save(25, state)
    assert [step for step, _ in seen] == [10, 20, 25]
    assert seen[-1][1] == pytest.approx(float(lbw_optax.metrics(state)["scale"]))
    assert "lbw_step 25.0" in (tmp_path / "mine.prom").read_text()
    assert sum("on_metrics" in r.getMessage() for r in caplog.records) == 1


def test_a_state_with_several_guards(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lbw_optax")
    two = {name: lbw_optax.adamw(0.1) for name in "ab"}
    tx = optax.partition(two, {"x": "a", "y": "b"})
    state = tx.init({"x": jnp.ones(2), "y": jnp.ones(2)})
    with TrainGuard(tmp_path, every=1) as guard:
        _, state = guard.on_restore(0, state)
        guard.on_step(1, state)
    assert "inner_states/b/inner_state: Soft start" in caplog.text
    (line,) = read(tmp_path / "log.jsonl")
    assert "inner_states/a/inner_state/scale" in line


def test_what_is_no_manager_is_refused(tmp_path):
    with pytest.raises(TypeError, match="rollback must be True, False or a RollbackManager"):
        TrainGuard(tmp_path, rollback="yes")


@pytest.mark.parametrize("every", [0, 65, 10.0, True])
def test_a_look_that_would_come_too_late_is_refused(tmp_path, every):
    with pytest.raises(ValueError, match="every must be a number of steps from 1 to 64"):
        TrainGuard(tmp_path, every=every)


def test_a_state_without_a_guard(tmp_path):
    with TrainGuard(tmp_path) as guard, pytest.raises(ValueError, match="holds no guard"):
        guard.on_restore(0, optax.adam(0.1).init(jnp.ones(2)))


def test_one_run_at_a_time(tmp_path):
    with TrainGuard(tmp_path), pytest.raises(OSError, match="Another AuditLog is open"):
        TrainGuard(tmp_path)
    TrainGuard(tmp_path).close()


# --- with rollback -------------------------------------------------------------------------------


def broken_once(at):
    pending = {at}

    def change(step, state):
        if step not in pending:
            return state
        pending.discard(step)
        params, opt_state = state
        return jax.tree.map(lambda p: p * np.float32(np.nan), params), opt_state

    return change


def test_a_broken_run_goes_back_and_is_resumed(tmp_path):
    """And the run that was killed and resumed is the run that was not."""
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    told = []
    with TrainGuard(tmp_path / "a", rollback=True, on_event=told.append) as guard:
        whole = loop(guard, 50, change=broken_once(30))
        assert guard.data_step(49) > 49
    (back,) = [x for x in told if x.line["action"] == "rollback"]
    assert (back.level, back.line["from_step"]) == ("warning", 32)
    assert back.step == back.line["to_step"]
    with TrainGuard(tmp_path / "b", rollback=True) as guard:
        state = loop(guard, 40, change=broken_once(30))
        guard.on_save(40, state)
    with TrainGuard(tmp_path / "b", rollback=True) as guard:
        assert_same_bits(loop(guard, 50), whole)
    events = [x for x in read(tmp_path / "b" / "events.jsonl") if x["action"] == "rollback"]
    assert len(events) == 1


def test_a_manager_of_ones_own_answers_orders_and_stays_open(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")

    def order(step, state):
        if step == 20 and not manager.history:
            give(tmp_path, "rollback")
        return state

    with lbw_optax.RollbackManager(tmp_path / "copies", snapshot_every=4) as manager:
        with TrainGuard(tmp_path, rollback=manager) as guard:
            loop(guard, 30, change=order)
        (made,) = manager.history
        assert "ordered by" in made.reason
        assert manager.report().snapshot_every == 4  # open


def test_a_state_of_another_run_is_where_the_first_checkpoint_is(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    with TrainGuard(tmp_path / "plain") as guard:
        state = loop(guard, 40)
    with TrainGuard(tmp_path / "safe", rollback=True) as guard:
        assert guard.on_restore(40, state)[0] == 40
    with TrainGuard(tmp_path / "safe", rollback=True) as guard:
        step, resumed = guard.on_restore(0, first())
    assert step == 40
    assert_same_bits(resumed, state)


def test_a_lost_run_with_rollback_says_so_at_once(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    told = []

    def change(step, state):
        return broken_once(step)(step, state) if step > 20 else state

    with (
        TrainGuard(tmp_path, rollback=True, on_event=told.append) as guard,
        pytest.raises(lbw_optax.GuardExhausted, match="Rollbacks so far"),
    ):
        loop(guard, 200, change=change)
    assert told[-1].level == "error"
    assert json.dumps(told[-1].line) == '{"action": "exhausted"}'
    assert read(tmp_path / "log.jsonl")[-1]["rollback_asked"]  # the report reads it there

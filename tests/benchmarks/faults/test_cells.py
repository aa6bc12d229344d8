"""The fault benchmark: what it injects, what it measures, and which faults the guard survives.

The small form of the benchmark's grid: one seed of the real decoder on a Markov chain.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_same_bits, slowly

from benchmarks.faults import cells, measures, run
from benchmarks.faults.measures import Trace
from benchmarks.faults.methods import METHODS, MIX_STEPS, SCENARIOS, STRUCK, mix
from benchmarks.faults.run import BATCH, CONFIG, IN_DATA, LENGTH, PLACES, STRETCH
from benchmarks.records import read
from lbw_optax.law import control
from lbw_optax.testing import KINDS, Fault
from train import jsonl

pytestmark = pytest.mark.process

RATE = 3e-3
adamw = METHODS["adamw"].build


@functools.cache
def text():
    """A Markov chain in which each token is followed by one of four."""
    draw = np.random.default_rng(0)
    followers = draw.integers(CONFIG.vocab_size, size=(CONFIG.vocab_size, 4))
    choices, tokens = draw.choice(4, p=[0.55, 0.25, 0.15, 0.05], size=60_000), [0]
    for choice in choices:
        tokens.append(followers[tokens[-1], choice])
    rows = np.asarray(tokens[-128 * (LENGTH + 1) :], np.int32).reshape(128, LENGTH + 1)
    train = np.asarray(tokens[: -rows.size], np.int32)
    return run.Text(train, rows[:8], {"valid": rows[:64], "test": rows[64:]})


# --- which faults are survived -----------------------------------------------------------------

# What a bit has done to a state, or a learning rate to the parameters, only a rollback undoes; from
# 500 bad steps or 50 random batches there is less to come back to. Stealth is not survived.
BEYOND = ("flip-parameter", "flip-mu", "flip-nu-sign", "lr-10", "lr-50", "nan-500", "random-50")
SURVIVED = [name for name in SCENARIOS if name not in (*BEYOND, "stealth")]
OFTEN = ("none", "nan-gradient", "nan-warmup", "gradient-1e6", "shift-25", "drift", "random-10")
RUINS_ADAMW = ("nan-gradient", "inf-gradient", "nan-activation", "nan-warmup", "nan-10", "nan-50")
RUINS_ADAMW += ("flip-parameter", "flip-mu", "flip-nu-sign", "gradient-1e3", "gradient-1e6")
RUINS_ADAMW += ("lr-10", "lr-50")


@functools.cache
def measured(scenario, method):
    return cells.measure(text(), cells.cell_of("grid", scenario, method, 0, RATE))


@pytest.mark.parametrize(
    "scenario", [*OFTEN, *slowly(*(name for name in SURVIVED if name not in OFTEN))]
)
def test_the_guard_survives(scenario):
    record = measured(scenario, "guard")
    assert record["survived"], record["ratio"]
    assert not record["nonfinite"]


@pytest.mark.parametrize(
    "scenario",
    ["flip-mu", *slowly("flip-parameter", "flip-nu-sign", "nan-500")],
)
def test_with_rollback_the_guard_survives(scenario):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    record = measured(scenario, "guard-rollback")
    assert record["survived"], record["ratio"]
    assert not record["nonfinite"]
    assert len(record["rollbacks"]) == len(record["reasons"]) == 1
    assert record["rollbacks"][0] <= 50
    assert record["lost"] >= record["rollbacks"][0]


@pytest.mark.parametrize("scenario", [*RUINS_ADAMW[:2], *slowly(*RUINS_ADAMW[2:])])
def test_the_fault_is_real(scenario):
    """AdamW does not survive it."""
    record = measured(scenario, "adamw")
    assert not record["survived"]
    assert None in record["recovery"]


def test_without_a_fault_nothing_happens():
    for method in ("adamw", "guard"):
        record = measured("none", method)
        assert record["ratio"] == 1
        assert (record["lost"], record["rollbacks"]) == (0, [])
        assert not record["exhausted"]
        assert set(record["curve"]) == {1.0}


def test_steps_lost():
    assert measured("nan-10", "guard")["lost"] == 10
    assert measured("nan-10", "adamw")["lost"] == 0


# --- the run -----------------------------------------------------------------------------------


def plain(fault, steps, rate=RATE):
    """A loop as a user would write it, with the fault in its places."""
    tx = optax.adamw(fault.schedule(run.schedule(rate)))
    params = run.start(adamw, 0).params
    state, losses = tx.init(params), []

    def loss_fn(params, step, inputs, targets):
        return run._loss(params, inputs, targets, functools.partial(fault.activations, step))

    @jax.jit
    def update(step, params, state, tokens):
        params, state = fault.params(step, params), fault.opt_state(step, state)
        batch = fault.batch(step, tokens[:, :-1], tokens[:, 1:], CONFIG.vocab_size)
        loss, grads = jax.value_and_grad(loss_fn)(params, step, *batch)
        loss, grads = fault.gradients(step, loss, grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        tokens = run.data.sample(text().train, 0, step, batch_size=BATCH, length=LENGTH)
        params, state = update(step, params, state, tokens)
        losses.append(float(run._evaluate(params, text().curve)))
    return np.array(losses)


@pytest.mark.parametrize(
    "kind",
    ["nan_activation", *slowly("none", "stealth", "flipped_nu", "flipped_parameter", "drift")],
)
def test_the_run_is_that_of_a_plain_loop(kind):
    """One compiled program for all faults does what a loop with this one fault in it does."""
    fault = Fault(kind, at=7, length=20, size=4 if "flipped" in kind else None, seed=5)
    rates = run.learning_rates(RATE, [fault])
    start = run.start(adamw, 0)
    _, trace = run.run(text(), adamw, 0, rates, [fault], start, 0, STRETCH)
    np.testing.assert_allclose(trace.loss[:30], plain(fault, 30), rtol=2e-3)
    assert trace.step.tolist() == list(range(STRETCH))


def test_a_dead_run_is_not_computed_to_its_end(monkeypatch):
    fault, given = Fault("nan_gradient", at=7), []
    rates, start = run.learning_rates(RATE, [fault]), run.start(adamw, 0)
    real = run.inputs_of
    monkeypatch.setattr(run, "inputs_of", lambda *x: given.append(x) or real(*x))
    state, trace = run.run(text(), adamw, 0, rates, [fault], start, 0, 3 * STRETCH)
    assert len(given) == STRETCH
    assert trace.step.tolist() == list(range(3 * STRETCH))
    assert np.isnan(trace.loss[7:]).all()
    assert trace.nonfinite[7:].all()
    assert np.isnan(run.final_loss(text(), state.params)["test"])


def test_every_kind_has_its_place():
    """In the data, in a place of the step, or in the schedule."""
    placed = {*IN_DATA, *(kind for kinds in PLACES.values() for kind in kinds)}
    assert set(KINDS) - placed == {"none", "learning_rate", "drift"}


@pytest.mark.parametrize("kind", KINDS)
def test_strikes_is_active_on_the_host(kind):
    fault = Fault(kind, at=5)
    steps = range(120)
    expected = [bool(active) for active in jax.vmap(fault.active)(jnp.arange(120))]
    assert [run.strikes(fault, step) for step in steps] == expected


def test_a_bad_batch_stays_bad_and_a_bit_flips_once():
    """After a rollback the clock goes on, while the data position may come again."""
    of_data, of_time = Fault("random_tokens", 9), Fault("flipped_parameter", 9)
    first = run.inputs_of(text(), 0, [of_data], clock=9, position=9)
    again = run.inputs_of(text(), 0, [of_data], clock=30, position=9)
    passed = run.inputs_of(text(), 0, [of_data], clock=9, position=40)
    assert_same_bits(first.inputs, again.inputs)
    assert first.strike.code == again.strike.code > 0
    assert passed.strike.code == 0
    assert run.inputs_of(text(), 0, [of_time], clock=9, position=40).strike.code > 0
    assert run.inputs_of(text(), 0, [of_time], clock=30, position=9).strike.code == 0


def test_the_mix_is_deterministic_and_has_its_rate():
    assert mix(7) == mix(7)
    numbers = [len(mix(seed)) for seed in range(400)]
    assert np.mean(numbers) == pytest.approx(2, abs=0.25)
    assert min(numbers) == 0
    faults_ = [fault for seed in range(400) for fault in mix(seed)]
    assert all(0 <= fault.at < MIX_STEPS - 50 for fault in faults_)
    assert len({fault.kind for fault in faults_}) == len(KINDS) - 1


def test_scenarios_strike_when_the_shared_start_ends():
    assert all(
        s.fault.at >= STRUCK for name, s in SCENARIOS.items() if name not in ("none", "nan-warmup")
    )
    assert all((cells.STEPS + s.extra) % STRETCH == 0 for s in SCENARIOS.values())


# --- the measures ------------------------------------------------------------------------------


def trace(step, loss=None, still=None, guard=None):
    step = np.asarray(step)
    loss = np.ones(len(step)) if loss is None else np.asarray(loss, float)
    still = np.zeros(len(step), bool) if still is None else np.asarray(still, bool)
    return Trace(step, loss, still, ~np.isfinite(loss), guard or {})


def test_ratio_compares_equal_steps_after_a_rollback():
    clean = np.array([5.0, 4.0, 3.0, 2.0])
    seen = trace([0, 1, 2, 1, 2, 3], [5, 4, 9, 4, 3, 2])
    assert measures.ratio(seen, clean, 2, 0).tolist() == [1, 1, 3, 1, 1, 1]


def test_ratio_leaves_out_steps_in_which_nothing_could_be_learned():
    clean = np.array([5.0, 4.0, 3.0, 2.0])
    seen = trace(range(6), [5, 4, 4, 4, 3, 2])
    assert measures.ratio(seen, clean, 2, 2)[[0, 1, 4, 5]].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("over_clean", "expected"),
    [
        ([1.0] * 30, 0),
        ([1.0] * 5 + [3.0, 1.5, 1.02] + [1.0] * 22, 3),
        ([1.0] * 5 + [3.0, 1.0, 3.0] + [1.0] * 22, 3),  # one good step is no recovery
        ([1.0] * 5 + [1.2] * 25, None),
        ([1.0] * 5 + [np.nan] * 25, None),
        ([1.0] * 5 + [np.inf, *[1.0] * 24], 1),
    ],
)
def test_recovery(over_clean, expected):
    moving = np.zeros(len(over_clean), bool)
    assert measures.recovery(np.array(over_clean), moving, 5) == expected


def test_a_run_that_stands_still_has_not_recovered():
    still = np.zeros(40, bool)
    still[7:12] = True
    assert measures.recovery(np.ones(40), still, 5) == 7


def test_interventions_of_a_guard_are_events_other_than_recoveries():
    guard = {"events": np.array([0, 1, 1, 2, 3, 3]), "regime": np.array([3, 2, 2, 3, 1, 1])}
    assert measures.interventions(trace(range(6), guard=guard)) == 2
    assert measures.interventions(trace([0, 1, 0, 1, 2, 3], guard=guard)) == 3
    assert measures.interventions(trace(range(6), still=[0, 1, 1, 0, 0, 0])) == 2


def test_judge():
    seen = trace([0, 1, 2, 3, 1, 2, 3], [4, 4, np.nan, np.nan, 4, 4, 4], [0, 0, 0, 1, 0, 0, 0])
    found = measures.judge(seen, np.full(4, 4.0), 4.1, 4.0, [2])
    assert found["survived"]
    assert found["nonfinite"]
    assert found["ratio"] == pytest.approx(1.025)
    assert (found["lost"], found["rollbacks"], found["steps_done"]) == (3, [3], 4)
    json.dumps(jsonl.finite(found))


# --- the command -------------------------------------------------------------------------------

COMMAND = ("--parts", "grid", "--methods", "adamw", "--seeds", "0", "--faults", "none", "nan-loss")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(run, "load", lambda directory: text())
    monkeypatch.setattr(cells, "LADDER", (1e-3, 3e-3))
    monkeypatch.setattr(cells, "TUNING_SEEDS", (1000,))


@pytest.mark.slow
def test_resumes_where_it_was_killed(short, tmp_path, capsys):
    out = tmp_path / "faults.jsonl"
    cells.main([*COMMAND, "--out", str(out)])
    records = read(out)
    assert [record["part"] for record in records] == ["tuning", "tuning", "grid", "grid"]
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-1]) + '{"setting":1,"see')
    cells.main([*COMMAND, "--out", str(out)])
    assert "1 cells are there, 1 to run" in capsys.readouterr().err
    again = read(out)
    names = ("part", "scenario", "method", "seed", "rate", "law")
    assert [[r.get(n) for n in names] for r in again] == [
        [r.get(n) for n in names] for r in records
    ]
    assert {record["rate"] for record in again} <= {1e-3, 3e-3}


@pytest.mark.parametrize(
    ("cell", "stated"),
    [
        (("grid", "nan-loss", "guard"), {"ratio", "survived", "recovery", "lost"}),
        (("grid", "flip-mu", "guard"), {"ratio", "survived", "recovery", "lost", "curve"}),
        (("mix", "mix", "adamw"), {"ratio", "survived", "recovery", "lost", "steps_done"}),
        (("calm", "none", "guard"), {"interventions"}),
    ],
)
def test_what_no_table_needs_is_not_kept(cell, stated):
    found = measures.judge(trace(range(8)), np.ones(8), 4.1, 4.0, [2])
    assert set(cells.kept(cells.cell_of(*cell, 0, RATE), found)) == stated
    struck = found | {"rollbacks": [3], "nonfinite": True}
    more = set(cells.kept(cells.cell_of(*cell, 0, RATE), struck)) - stated
    assert more == (set() if cell[0] == "calm" else {"rollbacks", "nonfinite"})


def test_a_cell_states_what_decides_it():
    given = cells.cell_of("grid", "nan-500", "guard", 3, RATE)
    assert given == {
        "part": "grid",
        "scenario": "nan-500",
        "method": "guard",
        "seed": 3,
        "rate": RATE,
        "steps": 800,
        "law": control.LAW,
    }
    assert cells.cell_of("grid", "nan-500", "adamw", 3, RATE) == given | {
        "method": "adamw",
        "law": None,
    }
    episode = cells.cell_of("mix", "mix", "guard-rollback", 7, RATE)
    assert (episode["steps"], episode["law"]) == (MIX_STEPS, control.LAW)
    assert episode["kinds"] == [fault.kind for fault in mix(7)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--faults", "nan-gradients"], "There is no fault 'nan-gradients': did you mean nan-gr"),
        (["--methods", "guards"], "There is no method 'guards': did you mean guard"),
        (["--parts", "grids"], "There is no part 'grids': did you mean grid?"),
        (["--data-dir", "/nowhere"], "there is no directory /nowhere"),
    ],
)
def test_bad_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cells.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err

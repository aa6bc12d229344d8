"""Orders given through a file to a run that is under way, and what of them is in the log."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_same_bits

import lbw_optax
from lbw_optax import orders
from lbw_optax.orders import Orders, give

TX = lbw_optax.lbw_guard(optax.adamw(1e-2))


@pytest.fixture(scope="module")
def state():
    params = jnp.arange(4.0)
    _, state = TX.update(params, TX.init(params), params, value=jnp.float32(1.0))
    return state


@pytest.mark.parametrize(
    ("order", "same"),
    [
        (("hold", 0.25), lambda s: lbw_optax.override(s, scale=0.25)),
        (("observe",), lambda s: lbw_optax.override(s, mode="observe")),
        (("govern",), lambda s: lbw_optax.override(s, mode="govern")),
        (("release",), lambda s: lbw_optax.override(s, scale="auto")),
        (("reset",), lbw_optax.reset),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_an_order_is_the_call_of_that_name_and_is_logged(state, tmp_path, order, same):
    standing = Orders(tmp_path)
    given = give(tmp_path, *order)
    with lbw_optax.AuditLog(tmp_path / "audit.jsonl") as log:
        obeyed = standing.obey(state, 7, log=log)
        assert standing.obey(obeyed, 8, log=log) is obeyed  # once
    assert_same_bits(obeyed, same(state))
    (line,) = [json.loads(x) for x in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert line == {"action": "order", "step": 7, "recorded_at": 7, **given._asdict()}
    assert "@" in given.who
    assert given.time.endswith("+00:00")


def test_the_scale_is_held_where_it_is(state, tmp_path):
    standing = Orders(tmp_path)
    give(tmp_path, "hold")
    held = standing.obey((jnp.ones(2), state), 1)
    np.testing.assert_allclose(
        lbw_optax.metrics(held)["scale"], lbw_optax.metrics(state)["scale"], rtol=1e-6
    )
    give(tmp_path, "release")
    assert not standing.obey(held, 2)[1].law.control.pinned


def test_what_was_ordered_of_an_earlier_process_is_passed_over(state, tmp_path):
    give(tmp_path, "hold", 0.5)
    assert Orders(tmp_path).obey(state, 1) is state


def test_lines_that_are_no_orders_are_passed_over_and_a_torn_one_waits(state, tmp_path):
    standing, file = Orders(tmp_path), tmp_path / orders.FILE
    whole = json.dumps(give(tmp_path, "hold", 0.5)._asdict())
    strange = [
        *("", "null", "[1]", "{}", "{", '{"order": "hold"}', "\u2028"),
        whole.replace("hold", "explode"),
        whole.replace("0.5", "2"),
        whole.replace("0.5", '"much"'),
        whole.replace("0.5", "NaN"),
    ]
    file.write_text("\n".join(strange) + "\n" + whole)
    assert standing.obey(state, 1) is state
    with file.open("a") as more:
        more.write("\n")
    assert lbw_optax.metrics(standing.obey(state, 2))["scale"] == 0.5


@pytest.mark.parametrize(
    ("order", "scale", "said"),
    [
        ("explode", None, "order must be one of"),
        ("hold", 0.0, r"scale must be in \(0, 1\]"),
        ("hold", float("nan"), r"scale must be in \(0, 1\]"),
        ("observe", 0.5, 'is for "hold" only'),
    ],
)
def test_no_other_order_can_be_given(tmp_path, order, scale, said):
    with pytest.raises(ValueError, match=said):
        give(tmp_path, order, scale)
    assert not (tmp_path / orders.FILE).exists()


def test_without_a_guard_an_order_is_refused(tmp_path):
    standing = Orders(tmp_path)
    give(tmp_path, "observe")
    with pytest.raises(ValueError, match="guard"):
        standing.obey(optax.adam(1e-3).init(jnp.ones(2)), 1)


@pytest.mark.parametrize(
    "given", [[], [("hold", 0.5, "ana@n\u00f8de", "t"), ("reset", None, "b", "t")]]
)
def test_what_the_first_process_hands_round_arrives_as_it_was(given):
    sent = [orders.Order(*fields) for fields in given]
    assert orders._unpacked(orders._packed(sent)) == sent


def test_a_rollback_that_is_ordered_is_made(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs the extra rollback")
    from rollback_loop import batch, start, update

    standing = Orders(tmp_path)
    with lbw_optax.RollbackManager(tmp_path / "run", snapshot_every=4, probation=3) as rollback:
        step, tree = rollback.resume(start())
        for call in range(30):
            if call == 25:
                give(tmp_path, "rollback")
            tree = update(tree, batch(rollback.data_step(step)))
            tree = standing.obey(tree, step, rollbacks=rollback)
            step, tree = rollback.step(step + 1, tree)
    (made,) = rollback.history
    assert "ordered by" in made.reason
    assert 25 < made.from_step <= 35

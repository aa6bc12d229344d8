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
        *("", "null", "[1]", "{}", "{", '{"order": "hold"}', "\u2028", "[" * 100_000),
        whole.replace("hold", "explode"),
        whole.replace("0.5", "2"),
        whole.replace("0.5", '"much"'),
        whole.replace("0.5", "NaN"),
        whole.replace("0.5", "true"),
        whole.replace("0.5", "1e-50"),
        whole.replace("0.5", "1e-39"),
        whole.replace("0.5", "[1, [2]]"),
        whole.replace("0.5", "9" * 400),
    ]
    file.write_text("\n".join(strange) + "\n" + whole)
    with pytest.warns(RuntimeWarning, match=r"no order and is passed over .*lbw-watch") as said:
        assert standing.obey(state, 1) is state
    assert len(said) == 1
    with file.open("a") as more:
        more.write("\n")
    assert lbw_optax.metrics(standing.obey(state, 2))["scale"] == 0.5


@pytest.mark.parametrize("who", ["null", "[NaN]", '"\\ud800"', '{"a": 1e999}'])
def test_whoever_gave_an_order_it_is_obeyed_and_logged(state, tmp_path, who):
    standing = Orders(tmp_path)
    line = f'{{"order": "hold", "scale": 0.5, "who": {who}, "time": null}}\n'
    (tmp_path / orders.FILE).write_text(line)
    with lbw_optax.AuditLog(tmp_path / "audit.jsonl") as log:
        assert lbw_optax.metrics(standing.obey(state, 7, log=log))["scale"] == 0.5
    assert isinstance(json.loads((tmp_path / "audit.jsonl").read_text())["who"], str)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_cannot_be_read_ends_no_run(state, tmp_path, when):
    file = tmp_path / orders.FILE

    def begin():
        if when == "before":
            file.mkdir()
        standing = Orders(tmp_path)
        file.mkdir(exist_ok=True)
        assert standing.obey(state, 1) is standing.obey(state, 2) is state
        return standing

    with pytest.warns(RuntimeWarning, match="no order is heard until it is a file") as said:
        standing = begin()
    assert len(said) == 1
    file.rmdir()
    assert standing.obey(state, 3) is state
    if when == "before":  # what is there then may be of an earlier process
        file.touch()
        assert standing.obey(state, 4) is state
    give(tmp_path, "hold", 0.5)
    assert lbw_optax.metrics(standing.obey(state, 5))["scale"] == 0.5


REPLACED = {
    "by_a_shorter_one": lambda file, new: file.write_bytes(new),
    "by_an_empty_one_first": lambda file, new: (file.write_bytes(b""), file.write_bytes(new)),
    "by_one_as_long": lambda file, new: file.write_bytes(new + b"#" * 300),
    "by_an_editor": lambda file, new: file.write_bytes(file.read_bytes() + new),
    "after_a_torn_line": lambda file, new: file.write_bytes(file.read_bytes() + b'{"o\n' + new),
}


@pytest.mark.filterwarnings("ignore:.*is no order")
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_file_that_another_has_taken_the_place_of_is_read_from_its_start(
    state, tmp_path, replace
):
    for scale in (0.5, 0.4, 0.3):
        give(tmp_path, "hold", scale)
    standing = Orders(tmp_path)
    give(tmp_path / "..", "hold", 0.25)
    new = tmp_path.parent / orders.FILE
    content = new.read_bytes()
    new.unlink()
    replace(tmp_path / orders.FILE, content)
    assert lbw_optax.metrics(standing.obey(state, 1))["scale"] == 0.25
    assert standing.obey(state, 2) is state


def test_an_order_that_is_taken_back_too_late_is_not_obeyed_once_more(state, tmp_path):
    """The file is shorter, and what is left of it was heard."""
    standing, file = Orders(tmp_path), tmp_path / orders.FILE
    for scale in (0.5, 0.25):
        give(tmp_path, "hold", scale)
    standing.obey(state, 1)
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    assert standing.obey(state, 2) is state
    give(tmp_path, "release")
    assert standing.obey(state, 3) is not state


def test_an_order_after_a_torn_one_is_a_line_of_its_own(state, tmp_path):
    (tmp_path / orders.FILE).write_bytes(b'{"order": "ho')
    standing = Orders(tmp_path)
    give(tmp_path, "hold", 0.5)
    with pytest.warns(RuntimeWarning, match="is no order"):
        assert lbw_optax.metrics(standing.obey(state, 1))["scale"] == 0.5


def test_a_scale_below_what_can_be_pinned_is_held_at_the_least(tmp_path):
    tx = lbw_optax.lbw_guard(optax.sgd(0.1), min_scale=1e-300)
    state = tx.init(jnp.ones(2))
    control = state.law.control._replace(log_scale=jnp.float32(-600))
    state = state._replace(law=state.law._replace(control=control))
    standing = Orders(tmp_path)
    give(tmp_path, "hold")
    assert bool(standing.obey(state, 1).law.control.pinned)


@pytest.mark.parametrize(
    ("order", "scale", "said"),
    [
        ("explode", None, "order must be one of"),
        ("hold", 0.0, r"scale must be in \(0, 1\]"),
        ("hold", float("nan"), r"scale must be in \(0, 1\]"),
        ("hold", 1e-50, r"scale must be in \(0, 1\]"),
        ("hold", True, r"scale must be in \(0, 1\]"),
        ("hold", "0.5", r"scale must be in \(0, 1\]"),
        ("observe", 0.5, 'is for "hold" only'),
    ],
)
def test_no_other_order_can_be_given(tmp_path, order, scale, said):
    with pytest.raises(ValueError, match=said):
        give(tmp_path, order, scale)
    assert not (tmp_path / orders.FILE).exists()


@pytest.mark.parametrize("half", [np.float32(0.5), np.float64(0.5), jnp.float32(0.5)])
def test_a_scale_of_any_kind_of_number_is_given(tmp_path, half):
    assert give(tmp_path, "hold", half).scale == 0.5


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

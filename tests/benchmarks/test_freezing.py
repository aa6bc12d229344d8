"""The benchmark of faults of one layer: what it breaks, and how it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import freezing
from benchmarks.parts import freezing as parts

OWN = f"layers/{freezing.LAYER}/"


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.fixture(scope="module")
def params():
    return freezing._split(0)[1]


@pytest.mark.parametrize(
    ("name", "changed"), [("", 12), ("down_proj", 1), ("[qk]_proj", 4)], ids=["all", "mlp", "qk"]
)
def test_a_fault_strikes_its_layer_only(params, name, changed):
    # Biases are zero at first.
    ones = jax.tree.map(jnp.ones_like, params)
    before, after = named(ones), named(freezing._times(ones, name, jnp.float32(10)))
    struck = [path for path, x in after.items() if not np.array_equal(x, before[path])]
    assert len(struck) == changed
    assert all(OWN in path for path in struck)
    same = named(freezing._times(ones, name, jnp.float32(1)))
    assert all(np.array_equal(x, before[path]) for path, x in same.items())


def test_a_lost_moment_is_the_second_of_its_layer(params):
    state = jax.tree.map(jnp.ones_like, optax.adam(1e-3).init(params))
    after = named(freezing._without_moment(state, jnp.array(True)))
    zero = {path for path, x in after.items() if not np.any(x)}
    assert zero == {path for path in after if "nu/" in path and OWN in path}
    assert len(zero) == 12


def test_each_cell_is_one_run_and_few_programs_serve_all():
    cells = [cell for part in freezing.PARTS for cell in freezing.plan(part, (0, 1))]
    assert len({tuple(cell.items()) for cell in cells}) == len(cells)
    assert {cell["law"] is None for cell in cells if cell.get("method") == "adamw"} == {True}


@pytest.mark.parametrize(
    ("level", "steps_done", "expected"),
    [(2.0, 300, 0), (1.5, 300, 0), (3.0, 300, 10), (2.0, 320, 20), (None, 300, None)],
)
def test_steps_lost(level, steps_done, expected):
    clean = {"level": [*np.linspace(20, 3, 29), 2.0], "steps_done": 300}
    run = {"level": [4.0, level], "steps_done": steps_done}
    assert parts.lost_steps(run, clean) == pytest.approx(expected) if expected else not expected

"""What a guarded step costs by XLA's own analysis, and that it grows with the leaves alone."""

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.speed import cost
from lbw_optax import lbw_guard

FEW, MANY = 30, 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "temporaries", "instructions"),
    [("guard around AdamW", 2.15, 200), ("guard before AdamW", 1.15, 110)],
)
def test_temporaries_and_instructions_of_many_leaves(placement, temporaries, instructions):
    few, many = (cost.cost(cost.OPTIMIZERS[placement](), leaves) for leaves in (FEW, MANY))
    assert max(few["temporaries"], many["temporaries"]) < temporaries
    a_leaf = (many["instructions"] - few["instructions"]) / (MANY - FEW)
    assert a_leaf < instructions


def test_groups_read_nothing_a_second_time():
    """Three passes more, and not nine: the squares of gradient, step and weights are shared."""
    names = ("guard around AdamW", "guard around AdamW, groups")
    plain, grouped = (cost.cost(cost.OPTIMIZERS[name](), 24)["passes"] for name in names)
    assert grouped < plain + 3


def test_one_program_governs_and_observes():
    params = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def program(mode):
        tx = lbw_guard(optax.sgd(0.1), mode=mode)
        state = jax.eval_shape(tx.init, params)
        return jax.jit(tx.update).lower(params, state, params, value=1.0).as_text()

    assert program("govern") == program("observe")

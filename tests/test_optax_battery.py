"""Optax's own tests of its optimizers, those of the installed version, on guarded ones.

They lie in Optax's wheel and are run from there. What fails is listed with the assumption that the
guard breaks; whatever else fails, or passes though it is listed, is an error.
"""

import functools
import inspect
import os
import re
import warnings
from unittest import mock

import jax
import optax
import pytest

from lbw_optax import lbw_guard

pytestmark = pytest.mark.filterwarnings("ignore")  # Optax's tests warn, and give the guard no loss
common = pytest.importorskip("optax.contrib._common_test", reason="needs Optax's tests")


def _guarded(factory):
    """A factory of guarded optimizers with the signature of this one, for `inject_hyperparams`."""

    @functools.wraps(factory)
    def guarded(*args, **kwargs):
        return lbw_guard(factory(*args, **kwargs))

    return guarded


def _sharding_tests():
    """Their optimizers are made when the module is imported; so are its settings of XLA."""
    names = [name for name, x in vars(optax).items() if inspect.isfunction(x)]
    aliases = [name for name in names if getattr(optax, name).__module__ == "optax._src.alias"]
    guarded = {name: _guarded(getattr(optax, name)) for name in aliases}
    patched = mock.patch.multiple(optax, **guarded)
    with patched, mock.patch.dict(os.environ), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("optax._src.sharding_test", reason="needs Optax's tests")


sharding = _sharding_tests()
# Those that every run of the tests takes; the rest takes half an hour, with `make test-slow`.
QUICK = ("'muon'", "_lion")
LONG = ("test_optimizers", "test_state_shape_dtype_shard_stability")  # 30,000 steps; four types

# Tests that leave a wrapper out, or put it around the guard.
UNWRAPPED = ("type_annotated", "inject_hyperparams", "shape_dtype_shard_stability")

# What the guard breaks, and the assumption of Optax's that it breaks.
BROKEN = {
    "test_optimizers-ademamix-parabola": "that swings across the minimum die out by themselves: "
    "its slow momentum swings for thousands of steps, which the guard takes for a rate that is "
    "seven times too high, and longer swings at a smaller scale die out later",
    "test_optimizers-lion-mechanize-parabola": "that what mechanize proposes is applied in full: "
    "it measures the way from its start, and the guard scales down the swings of lion's signs",
    **dict.fromkeys(
        (
            "test_state_sharding_type_init_match_update_lbfgs",
            "test_state_sharding_type_preserved_with_jit_lbfgs",
        ),
        "none of the guard's: on this jax Optax's own lbfgs fails it without one",
    ),
}
REFUSED = "schedule_free goes around the guard; inside it is refused with a sentence that says so"


def _cases(kind):
    """The tests of a class of Optax's, each by its name and what it is about."""
    found = []
    for name in (name for name in dir(kind) if name.startswith("test")):
        about = getattr(getattr(kind, name), "__x_params_repr__", "")
        words = re.findall(r"(?:_name='|dtype='|_setup_)(\w+)", about)
        quick = any(word in name + about for word in QUICK) and "mechanize" not in about
        long = name.rstrip("0123456789") in LONG
        marks = [] if quick and not long else [pytest.mark.slow]
        reason = BROKEN.get("-".join([name.rstrip("0123456789"), *words[:-1]]))
        wraps = "wrap=False" not in about and not any(word in name for word in UNWRAPPED)
        wrapped = "wrapper_name='schedule_free" in about and wraps
        reason = REFUSED if wrapped or "opt_name='schedule_free" in about else reason
        marks += [pytest.mark.xfail(reason=reason)] if reason else []
        found.append(pytest.param(name, marks=marks, id="-".join([name, *words])))
    return found


@pytest.fixture
def guards(monkeypatch):
    """Every optimizer that Optax's tests make is guarded; a wrapper is inside of the guard."""
    make, wrap = common._get_opt_factory, common._wrap_opt
    bare = {}

    def guarded(name):
        factory = make(name)

        @functools.wraps(factory)
        def both(*args, **kwargs):
            inner = factory(*args, **kwargs)
            tx = lbw_guard(inner)
            bare[id(tx)] = tx, inner
            return tx

        return both

    monkeypatch.setattr(common, "_get_opt_factory", guarded)
    monkeypatch.setattr(
        common, "_wrap_opt", lambda tx, *how: lbw_guard(wrap(bare[id(tx)][1], *how))
    )


def run(test):
    """One of Optax's tests; its failure is that of the test which calls this."""
    with jax.numpy_rank_promotion("allow"):
        test.debug()


@pytest.mark.parametrize("name", _cases(common.ContribTest))
def test_contrib(name, guards):
    run(common.ContribTest(name))


@pytest.mark.parametrize("name", _cases(sharding.ShardingTest))
def test_sharding(name):
    # Optax compares versions as words, by which 0.10 is before 0.7.2, and would skip the test.
    with mock.patch.object(jax, "__version__", "0.9.9"):
        run(sharding.ShardingTest(name))

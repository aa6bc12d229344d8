"""What divergence is: on logs whose answer is plain, and what must hold on any."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lbw_optax.law.outcome import STAYS, Divergence, divergence

FALLING = 3 * 0.99 ** np.arange(200.0) + 0.02 * np.random.default_rng(0).standard_normal(200)
LEVEL_LAGS = 2  # the median of five has moved with the third of them


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (FALLING, None),
        (FALLING[:4], None),
        (np.ones(100), None),
        (np.append(FALLING, [np.nan]), Divergence(200, 200)),
        (np.append(FALLING, [np.inf, 1.0]), Divergence(200, 200)),
        (np.append(FALLING, np.full(60, 3.0)), Divergence(202, 221)),
        # It is gone before twenty entries have passed.
        (np.concatenate([FALLING, np.full(15, 3.0), np.full(60, 0.4)]), None),
        # It lasts, but is within what the run has won on average.
        (np.append(FALLING, np.full(60, 0.9)), None),
        # The log ends in the rise: with two levels in it, and with one.
        (np.append(FALLING, np.full(4, 3.0)), Divergence(202, 203)),
        (np.append(FALLING, np.full(3, 3.0)), None),
    ],
    ids=lambda x: "" if isinstance(x, np.ndarray) else str(x),
)
def test_on_logs_whose_answer_is_plain(log, expected):
    assert divergence(log) == expected


def test_a_rollback_is_one():
    made = np.zeros(200, bool)
    made[70] = True
    assert divergence(FALLING, made) == Divergence(70, 70)


logs = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        lambda rng: (
            np.cumsum(rng.standard_normal(120) * 10 ** rng.uniform(-2, 1))
            + rng.standard_normal(120)
        )
    )(np.random.default_rng(seed))
)


@pytest.mark.parametrize("shape", [(), (2, 60)])
def test_several_runs_at_once_are_refused(shape):
    with pytest.raises(ValueError, match="The loss of one run"):
        divergence(np.ones(shape))


def by_loops(log: np.ndarray) -> Divergence | None:
    """The same, sentence by sentence, of finite logs."""
    n = len(log)
    level = [float(np.median(log[max(0, t - 4) : t + 1])) for t in range(n)]
    for t in range(5, n - 1):
        ahead = level[t : t + STAYS]
        std = 1.4826 / 2**0.5 * np.median(np.abs(np.diff(log[: t + 1])))
        limit = max(np.mean(level[:t]), min(level[:t]) + 6 * std)
        if min(ahead) > limit + np.finfo(np.float32).eps * abs(min(level[:t])):
            return Divergence(t, t + len(ahead) - 1)
    return None


@settings(max_examples=30)
@given(logs)
def test_it_is_what_the_sentences_say(log):
    assert divergence(log[:100]) == by_loops(log[:100])


@given(logs, st.sampled_from([2.0**-20, 0.5, 2.0**20]), st.sampled_from([-64.0, 0.0, 64.0]))
def test_neither_unit_nor_offset_matters(log, unit, offset):
    coarse = np.round(log * 1024) / 1024  # so that both are exact
    assert divergence(unit * (coarse + offset)) == divergence(coarse)


@given(logs)
def test_it_is_known_when_it_stands_and_not_before(log):
    found = divergence(log)
    if found is not None and found.stands - found.begins == STAYS - 1:
        assert divergence(log[: found.stands + 1]) == found
        before = divergence(log[: found.begins + 1])
        assert before is None or before.stands < found.stands

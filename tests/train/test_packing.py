"""Packed rows against a walk over the stream, and batches made ahead by a thread."""

import threading

import numpy as np
import pytest

from train import data, packing

END = 0


def stream(rng, documents=30):
    pieces = [np.append(rng.integers(1, 50, rng.integers(1, 20)), END) for _ in range(documents)]
    return np.concatenate(pieces).astype(np.int32)


def test_segments_are_the_documents_of_a_walk_over_each_row():
    rng = np.random.default_rng(0)
    batch = packing.packed(stream(rng), 0, 0, batch_size=8, length=24, end=END)
    for row, numbers in zip(batch.tokens, batch.segments, strict=True):
        document, expected = 0, []
        for token in row:
            expected.append(document)
            document += token == END
        assert numbers.tolist() == expected
    assert batch.segments.dtype == batch.tokens.dtype == np.int32


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_an_epoch_has_every_row_once_and_epochs_differ(batch_size):
    tokens = np.arange(1, 102, dtype=np.int32)
    rows, length = 20, 5

    def begins(first, count):
        steps = range(first // batch_size, -(-(first + count) // batch_size))
        drawn = [
            packing.packed(tokens, 3, step, batch_size=batch_size, length=length, end=END).tokens
            for step in steps
        ]
        offset = first - steps.start * batch_size
        return np.concatenate(drawn)[offset : offset + count]

    first, second = begins(0, rows), begins(rows, rows)
    for epoch in (first, second):
        assert sorted(epoch[:, 0]) == list(range(1, 101, length))
        assert np.all(np.diff(epoch) == 1)
        assert sorted(epoch[:, 1:].ravel()) == list(range(2, 102))
    assert first.tolist() != second.tolist()


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = stream(np.random.default_rng(1), 100)

    def draw(seed, step):
        return packing.packed(tokens, seed, step, batch_size=4, length=9, end=END).tokens.tolist()

    forth = [draw(seed, step) for seed in range(3) for step in range(40)]
    packing._order.cache_clear()
    back = [draw(seed, step) for seed in reversed(range(3)) for step in reversed(range(40))]
    assert forth == back[::-1]
    assert draw(0, 0) != draw(1, 0)


def test_too_little_text_is_named():
    with pytest.raises(data.DataError, match="5 tokens are too few for one sequence of 5"):
        packing.packed(np.arange(5), 0, 0, batch_size=1, length=5, end=END)


@pytest.mark.parametrize("order", [range(20), [0, 1, 2, 9, 10, 3, 4, 5, 6, 30, 31, 0]])
def test_prefetched_batches_are_those_of_their_indices(order):
    with packing.Prefetch(lambda index: np.full(3, index)) as batch:
        assert [int(batch(index)[0]) for index in order] == list(order)


def test_the_next_batch_is_made_while_the_last_one_is_used():
    made = [threading.Event() for _ in range(4)]

    def make(index):
        made[index].set()
        return np.zeros(1)

    with packing.Prefetch(make, ahead=2) as batch:
        batch(0)
        assert made[1].wait(10)
        assert made[2].wait(10)
        assert not made[3].is_set()


def test_what_goes_wrong_in_the_thread_is_raised_at_the_step_that_asks():
    def make(index):
        if index == 2:
            raise data.DataError("batch 2 is broken")
        return np.zeros(1)

    with packing.Prefetch(make) as batch:
        batch(0)
        batch(1)
        with pytest.raises(data.DataError, match="batch 2 is broken"):
            batch(2)

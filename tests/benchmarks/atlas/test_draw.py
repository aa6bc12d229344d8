"""The draw of the atlas: the same every time, and all that it is said to cover."""

from collections import Counter

import pytest

from benchmarks.atlas import draw

HALVES = {half: draw.draw(half) for half in draw.HALVES}
ALL = [task for half in HALVES.values() for task in half]


def test_the_draw_is_a_function_of_its_seed():
    assert draw.draw("choose") == HALVES["choose"]
    assert draw.draw("choose", seed=1) != HALVES["choose"]
    assert len({task._replace(name="", half="", seed=0) for task in ALL}) == len(ALL) == 48
    assert list(draw.tasks()) == [task.name for task in ALL]


@pytest.mark.parametrize(
    ("fact", "values"),
    [
        ("family", {family for family, _ in draw.FAMILIES}),
        ("block", {block for _, block in draw.FAMILIES}),
        ("width", set(draw.WIDTHS)),
        ("depth", set(draw.DEPTHS)),
        ("steps", set(draw.STEPS)),
        ("optimizer", set(draw.OPTIMIZERS)),
        ("schedule", set(draw.SCHEDULES)),
        ("warmup", set(draw.WARMUPS)),
        ("init", set(draw.INITS)),
        ("layout", set(draw.LAYOUTS)),
        ("dtype", set(draw.DTYPES)),
        ("clip", set(draw.CLIPS)),
        ("start", set(draw.STARTS)),
    ],
)
@pytest.mark.parametrize("half", draw.HALVES)
def test_each_half_has_all_of_it(half, fact, values):
    assert {getattr(task, fact) for task in HALVES[half]} == values


@pytest.mark.parametrize("fact", ["family", "width", "depth", "steps", "optimizer", "start"])
def test_the_halves_have_the_same_share_of_everything(fact):
    one, other = (Counter(getattr(task, fact) for task in HALVES[half]) for half in draw.HALVES)
    assert one == other


def test_what_is_asked_of_the_whole():
    assert {task.b2 for task in ALL if task.optimizer == "AdamW"} == {0.95, 0.99, 0.999}
    assert {task.weight_decay for task in ALL} == set(draw.DECAYS)
    assert {task.rank for task in ALL if task.start == "LoRA"} >= {2, 4, 32, 64}
    tuned = [task for task in ALL if task.start != "scratch"]
    assert {task.shift for task in tuned} == {"none", "near", "far"}
    assert all(task.multiples[-1] == 100 for task in tuned)
    assert Counter(task.optimizer for task in ALL)["AdamW"] > 24


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_a_task_is_small_and_possible(task):
    row = task._asdict()
    rows = task.batch * task.length
    assert draw._per_row(row) * rows * task.steps <= 1.5 * draw.BUDGET
    assert task.steps % draw.POINTS == 0
    assert task.batch >= 4
    assert task.start == "scratch" or task.family in draw.TEXT


def test_cards_that_fit_nowhere_are_refused():
    rows = [{"width": 1}, {"width": 2}]
    deal = draw._dealer(draw.np.random.default_rng(0), rows)
    with pytest.raises(ValueError, match="the cards of depth do not fit"):
        deal("depth", {7: 2}, lambda row, card: row["width"] == 1)


def test_a_row_gives_its_card_to_one_that_fits_no_other():
    for seed in range(20):
        rows = [{"width": 1}, {"width": 2}, {"width": 3}]
        deal = draw._dealer(draw.np.random.default_rng(seed), rows)
        deal("depth", {1: 1, 2: 1, 3: 1}, lambda row, card: card <= row["width"])
        assert [row["depth"] for row in rows] == [1, 2, 3]

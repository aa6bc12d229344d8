"""The arithmetic of the atlas' tables, on records with numbers worked out by hand."""

import math

import pytest

from benchmarks.atlas import draw, grid, tables, targets
from benchmarks.atlas.methods import METHODS, OWN
from lbw_optax.law.control import LAW
from train import jsonl

TASKS = draw.tasks("choose")
LANGUAGE = next(t for t in TASKS.values() if t.start == "scratch" and t.family == "decoder")
TUNED = next(t for t in TASKS.values() if t.start != "scratch")
SQUARED = next(t for t in TASKS.values() if t.family == "diffusion")
FREE = next(name for name, method in METHODS.items() if not method.takes_lr)


def record(task, method, multiple, loss, *, seed=1, tuned=0.01, **facts):
    return {
        "task": task.name,
        "facts_of_task": grid.facts_of(task),
        "method": method,
        "lr": None if multiple is None else 0.01 * multiple,
        "seed": seed,
        "tuned": tuned,
        "law": LAW if METHODS[method].guarded else None,
        "before": 5.0,
        "loss": loss,
        "seconds": 36.0,
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"python": "3.11"},
        "machine": "a machine",
        **({"data": "a text", "tokens": "t"} if task.family in draw.TEXT else {}),
        **facts,
    }


def of(*found):
    return grid.load(found)


def test_a_cross_entropy_is_compared_as_a_perplexity_and_a_squared_error_as_it_is():
    found = of(
        record(LANGUAGE, OWN, 1, 3.0),
        record(LANGUAGE, "guard", 3, 3.1),
        record(SQUARED, OWN, 1, 0.2),
        record(SQUARED, "guard", 3, 0.3),
        record(SQUARED, "guard", 10, None),
        record(SQUARED, FREE, None, 0.1),
    )
    assert grid.ratio(found, LANGUAGE, "guard", 3) == pytest.approx(math.exp(0.1))
    assert grid.ratio(found, SQUARED, "guard", 3) == pytest.approx(1.5)
    assert grid.ratio(found, SQUARED, "guard", 10) == math.inf
    assert grid.ratio(found, SQUARED, "guard", 30) is None
    assert grid.ratio(found, SQUARED, FREE, 1) == grid.ratio(found, SQUARED, FREE, 30) == 0.5


def test_seeds_are_paired_and_the_median_counts():
    own = [record(SQUARED, OWN, 1, loss, seed=s) for s, loss in enumerate([1.0, 2.0, 4.0])]
    guard = [record(SQUARED, "guard", 3, loss, seed=s) for s, loss in enumerate([3.0, 2.0, 8.0])]
    alone = record(SQUARED, "guard", 3, 9.0, seed=7)
    assert grid.ratio(of(*own, *guard, alone), SQUARED, "guard", 3) == 2.0


def test_a_run_of_tuning_is_no_cell_of_the_comparison():
    tried = [record(SQUARED, OWN, k, 9.0, seed=0, tuned=None) for k in (1, 3)]
    cells = [record(SQUARED, OWN, 1, 1.0), record(SQUARED, OWN, 3, 2.0)]
    guard = record(SQUARED, "guard", 3, 1.0)
    assert grid.ratio(of(*tried, *cells, guard), SQUARED, OWN, 3) == 2.0
    assert len(of(*tried, *cells, guard).cells) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"tuned": None, "lr": 0.02},  # a rate that tuning tried
        {"facts_of_task": {"of": "another draw"}},
        {"task": "unknown"},
        {"method": "unknown"},
    ],
)
def test_what_is_no_cell_of_the_grid_is_left_out(other):
    own = record(SQUARED, OWN, 1, 1.0)
    assert of(own | other, own).cells == of(own).cells


def test_the_newest_record_of_todays_law_and_of_one_text_counts():
    own = record(LANGUAGE, OWN, 1, 3.0)
    found = of(
        own,
        record(LANGUAGE, "guard", 1, 4.0),
        record(LANGUAGE, "guard", 1, 3.0),
        record(LANGUAGE, "guard", 3, 9.0, law="a prototype"),
        record(LANGUAGE, "guard", 10, 9.0, data="another text"),
        own,
    )
    assert grid.ratio(found, LANGUAGE, "guard", 1) == 1.0
    assert {key[2] for key in found.cells if key[1] == "guard"} == {1}


def test_a_clip_that_the_task_has_is_its_own_optimizer():
    task = LANGUAGE if LANGUAGE.clip else next(t for t in TASKS.values() if t.clip)
    assert not METHODS["clip-1.0"].applies(task)
    own, guard = record(task, OWN, 1, 3.0), record(task, OWN, 3, 3.5)
    assert grid.ratio(of(own, guard), task, "clip-1.0", 3) == pytest.approx(math.exp(0.5))


def test_a_spread_is_over_all_cells_or_not_at_all():
    cells = [record(task, OWN, 1, 1.0) for task in (SQUARED, TUNED)]
    cells += [record(SQUARED, "guard", k, loss) for k, loss in ((3, 1.1), (10, 1.2), (30, 1.3))]
    cells += [record(TUNED, "guard", k, 1.0) for k in (3, 10, 30)]
    assert grid.spread(of(*cells), [SQUARED, TUNED], "guard", targets.ABOVE) is None
    cells.append(record(TUNED, "guard", 100, None))
    found = grid.spread(of(*cells), [SQUARED, TUNED], "guard", targets.ABOVE)
    assert found == (pytest.approx(1.1), math.inf, math.inf, 7, 2)
    assert grid.spread(of(*cells), [SQUARED], "guard", targets.ABOVE).worst == pytest.approx(1.3)


def whole(half, losses):
    """Every cell of a half: the own optimizer at 1, methods at what `losses` gives them."""
    cells = []
    for task in draw.tasks(half).values():
        cells += [record(task, OWN, k, 1.0 if k == 1 else 3.0) for k in task.multiples]
        for name in METHODS:
            if name != OWN and METHODS[name].applies(task):
                rated = task.multiples if METHODS[name].takes_lr else [None]
                cells += [record(task, name, k, losses(task, name, k)) for k in rated]
    return cells


def test_targets_are_of_one_half_and_wait_for_its_last_cell():
    def losses(task, name, k):
        loss = 1.0 if name == "guard" else 2.0
        worst = (task.name, k) == (SQUARED.name, 3)
        return 1.2 if name == "guard" and worst else loss

    cells = whole("choose", losses)
    found = {t.title: t for t in targets.targets(of(*cells), "choose")}
    assert found["tuned rate, median"].verdict == "must reached"
    assert found["×3 … ×30 (fine-tuning ×100), worst"].measured == pytest.approx(1.2)
    assert found["×3 … ×30 (fine-tuning ×100), worst"].verdict == "missed"
    # No peer is better than 2 (a squared error) in its worst task: the guard's 1.2 over e^1 or e^2.
    assert found["worst task ÷ worst task of the best peer"].measured <= 1.2 / 2
    assert {t.verdict for t in targets.targets(of(*cells), "held-out")} == {"not measured"}
    lacking = [
        c for c in cells if (c["task"], c["method"], c["lr"]) != (SQUARED.name, "guard", 0.1)
    ]
    verdicts = [t.verdict for t in targets.targets(of(*lacking), "choose")]
    assert verdicts[:2] == ["must reached", "aim reached"]
    assert set(verdicts[2:]) == {"not measured"}


def test_a_peer_that_diverges_is_no_rival():
    cells = whole("choose", lambda task, name, k: 1.0 if name == "guard" else None)
    assert targets.to_peers(of(*cells), "choose") == 0
    cells = whole("choose", lambda task, name, k: None if name == "guard" else 2.0)
    assert targets.to_peers(of(*cells), "choose") == math.inf


def test_the_page_comes_from_the_result_file(tmp_path):
    results, out = tmp_path / "atlas.jsonl", tmp_path / "ATLAS.md"
    cells = whole("choose", lambda task, name, k: 1.5)
    setting = {"setting": 1, "facts": {}}
    jsonl.append(results, setting, *({"setting": 1, **cell} for cell in cells))
    tables.main(["--results", str(results), "--out", str(out)])
    text = out.read_text()
    assert text == tables.page(results)
    assert tables.TITLES["choose"] in text
    assert tables.TITLES["held-out"] not in text
    assert "| guard | 24 | 1.649 |" in text
    assert all(f"| {name} |" in text for name in TASKS)
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path / "none.jsonl"), "--out", str(out)])

"""The arithmetic of the health benchmark's page, on records with numbers worked out by hand."""

import math

import pytest

from benchmarks.health import results, tables, targets
from benchmarks.health.tasks import tasks
from lbw_optax.law.control import LAW

FACTS = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "versions": {"jax": "0.10.2"},
    "machine": "a machine",
    "seconds": 36.0,
}


def record(name, method, metric, seed=0, **facts):
    own = {"task": name, "method": method, "seed": seed, "steps": tasks()[name].steps}
    if method in ("bare", "warm-up"):
        return {**FACTS, **own, "law": None, "metric": metric, **facts}
    guarded = {"calls": 1000, "skipped": 0, "ended": None, "scale": 1.0}
    if method == "guard-rollback":
        guarded["rollbacks"] = []
    return {**FACTS, **own, "law": LAW, "metric": metric, **guarded, **facts}


def whole(**changed):
    """Every task, with two seeds, as good as bare but for what is changed by its name."""
    return [
        record(name, method, 1.0, seed) | (changed.get(name, {}) if method == "guard" else {})
        for name in tasks()
        for method in ("bare", "guard")
        for seed in (0, 1)
    ]


def verdicts(found):
    return {t.title: (t.measured, t.verdict) for t in targets.targets(found, "guard")}


def test_all_targets_are_reached_by_a_guard_that_does_nothing():
    found = verdicts(results.load(whole()))
    assert {verdict for _, verdict in found.values()} == {"reached"}
    assert len(found) == 5


@pytest.mark.parametrize(
    ("name", "changed", "title", "measured"),
    [
        ("mlp", {"metric": 1.03}, "final metric, worst task", "+3.0 ± 0.0 % (mlp)"),
        ("grpo", {"metric": 0.9}, "final metric, worst task", "+10.0 ± 0.0 % (grpo)"),
        ("gan", {"metric": 1.06}, "final metric, gan", "+6.0 ± 0.0 %"),
        ("mlp", {"metric": None}, "final metric, worst task", "not finite (mlp)"),
        ("mlp", {"ended": 700}, "runs ended by the guard", f"2 of {2 * len(tasks())}"),
        ("mlp", {"skipped": 2}, "sound steps skipped, worst task", "0.20 % (mlp)"),
        ("mlp", {"skipped": 100}, "sound steps skipped, of all", f"{10 / len(tasks()):.2f} %"),
    ],
)
def test_what_is_missed_is_said(name, changed, title, measured):
    found = results.load(whole(**{name: changed}))
    assert verdicts(found)[title] == (measured, "missed")
    (line,) = targets.missed(found, "guard")
    assert line.startswith(f"{name}: ")
    assert f"- guard, {line}" in tables.summary(whole(**{name: changed}))


@pytest.mark.parametrize(("name", "metric"), [("gan", 1.04), ("mlp", 1.015), ("grpo", 3.0)])
def test_what_is_allowed_is_no_miss(name, metric):
    assert targets.missed(results.load(whole(**{name: {"metric": metric}})), "guard") == []


def test_a_target_waits_for_the_last_task():
    few = [r for r in whole() if r["task"] != "gan"]
    found = verdicts(results.load(few))
    assert {verdict for _, verdict in found.values()} == {"holds so far"}
    assert "final metric, gan" not in found


def test_seeds_are_paired_and_those_that_a_method_lacks_are_left_out():
    found = results.load(
        [
            *(record("mlp", "bare", bare, seed) for seed, bare in enumerate((1.0, 2.0, 9.0))),
            *(record("mlp", "guard", own, seed) for seed, own in enumerate((1.1, 2.0, 1.0))),
            *(record("mlp", "guard-rollback", 1.0, seed) for seed in (0, 1, 7)),
            record("gan", "guard", 5.0),
        ]
    )
    assert [own["seed"] for own in found.of("guard", "mlp")] == [0, 1]
    assert not found.of("guard", "gan")  # nothing to compare it with
    change = results.change(tasks()["mlp"], found.pairs("mlp", "guard"))
    assert change == pytest.approx((0.05, 0.05))


def test_the_newest_record_of_todays_law_and_of_todays_tasks_counts():
    found = results.load(
        [
            record("mlp", "bare", 1.0),
            record("mlp", "guard", 9.0),
            record("mlp", "guard", 2.0),
            record("mlp", "guard", 7.0, law="a prototype"),
            record("mlp", "guard", 7.0, steps=3),
            record("mlp", "guard", 7.0) | {"task": "no more"},
        ]
    )
    assert [own["metric"] for own in found.of("guard", "mlp")] == [2.0]


@pytest.mark.parametrize(
    ("name", "bare", "guarded", "expected"),
    [
        ("mlp", 0.5, 0.6, 0.2),
        ("grpo", 0.5, 0.4, 0.2),
        ("grpo", -0.5, -0.6, 0.2),
        ("rare-1", 0.0, 0.0, 0.0),
        ("rare-1", 0.0, 0.5, -math.inf),
        ("mlp", 0.5, None, math.inf),
    ],
)
def test_worse_is_above_zero(name, bare, guarded, expected):
    assert results.worse(tasks()[name], bare, guarded) == pytest.approx(expected)


def test_a_bare_run_that_is_lost_is_none_to_compare_with():
    found = results.load([record("mlp", "bare", None), record("mlp", "guard", 1.0)])
    assert results.change(tasks()["mlp"], found.pairs("mlp", "guard")) is None


def test_the_page():
    deeds = {"skipped": 5, "ended": 700, "scale": 0.25}
    found = whole(mlp=deeds | {"metric": 1.25})
    found += [
        record(name, "guard-rollback", 1.0, seed, rollbacks=["loss"] * (name == "mlp"))
        for name in tasks()
        for seed in (0, 1)
    ]
    text = tables.page(found)
    assert f"Law {LAW}; {6 * len(tasks())} runs, seeds 0–1" in text
    assert "| mlp | held-out loss | 1 | **+25.0 ± 0.0 %** | +0.0 ± 0.0 % |" in text
    assert (
        "| mlp | 0.50 % |  | 2 of 2 (step 700, 700) | 0.25 | 0.00 % | 2 | 0 of 2 | 1.00 |" in text
    )
    assert all(text.count(f"| {name} |") == 3 for name in tasks())


def test_what_a_warm_up_does_stands_beside_what_the_guard_does():
    others = [record(r["task"], "warm-up", 1.01, r["seed"]) for r in whole() if r["law"]]
    text = tables.page([*whole(mlp={"metric": 1.03}), *others])
    assert "mlp: held-out loss +3.0 ± 0.0 % (warm-up without a guard: +1.0 ± 0.0 %)" in text
    assert "| mlp | held-out loss | 1 | +1.0 ± 0.0 % | **+3.0 ± 0.0 %** |" in text
    assert "| runs ended by the guard | none | 0 of" in text


def test_without_a_result_the_page_says_so():
    for found in ([], [record("mlp", "bare", 1.0)]):
        assert tables.NOT_RUN in tables.page(found)
        assert tables.summary(found) == tables.NOT_RUN
    assert all(f"| {name} |" in tables.page([]) for name in tasks())

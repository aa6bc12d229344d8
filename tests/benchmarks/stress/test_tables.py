"""The statistics and tables, on a small result file with numbers worked out by hand."""

import json
import math

import pytest
from matplotlib.figure import Figure

from benchmarks import colours
from benchmarks.stress import figure, tables, targets
from benchmarks.stress import grid as grids
from benchmarks.stress.pace import reached
from benchmarks.stress.regimes import REGIMES

BEFORE = math.exp(6.0)


def record(regime, method, multiple, loss, *, seed=0, curve=(5.0, 4.0, 3.0), law=None, **facts):
    """A line of the result file; the tuned rate is 0.01 in every regime."""
    guard = {"events": 1, "skips": 0, "cuts": 0, "share_below": 0, "smallest": 0.01, "last": 1}
    return {
        "regime": regime,
        "method": method,
        "lr": multiple and 0.01 * multiple,
        "seed": seed,
        "tuned": 0.01,
        "law": law,
        "steps": 100,
        "before": {"valid": BEFORE, "test": BEFORE},
        "perplexity": {"valid": 1.0, "test": None if loss is None else math.exp(loss)},
        "valid_curve": list(curve),
        "guard": guard if method.startswith("guard") else None,
        "seconds": 2.0,
        "tokens": "t",
        "size": "tiny",
        "base_steps": 1,
        "data": "corpus",
        "tokenizer": "bytes",
        "model": {"num_hidden_layers": 1, "hidden_size": 8},
        "length": 8,
        "batch_size": 2,
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"python": "3.11"},
        "machine": "a machine",
        **facts,
    }


def scratch(method, losses, **facts):
    multiples = REGIMES["scratch"].multiples
    return [
        record("scratch", method, k, loss, **facts)
        for k, loss in zip(multiples, losses, strict=True)
    ]


ADAMW = scratch("adamw", [4.0, 4.5, 7.0, None])
GUARD = scratch("guard", [4.1, 4.1, 4.2, 4.2], curve=(4.0, 2.0, 2.0))


def grid_of(*records):
    return grids.load(list(records), "test")


def test_sensitivity_caps_at_the_loss_before_training():
    grid = grid_of(*ADAMW, *GUARD)
    # (4 + 4.5 + 6 + 6) / 4 - 4 and (4.1 + 4.1 + 4.2 + 4.2) / 4 - 4.1
    assert grids.sensitivity(grid, "scratch", "adamw") == pytest.approx(1.125)
    assert grids.sensitivity(grid, "scratch", "guard") == pytest.approx(0.05)


def test_sensitivity_is_the_median_over_seeds_and_needs_the_whole_grid():
    seeds = [scratch("adamw", [4.0 + s, 4.0 + s, 4.0 + s, 5.0], seed=s) for s in (0, 1, 2)]
    grid = grid_of(*seeds[0], *seeds[1], *seeds[2])
    # 0.25 for seed 0, 0 for seed 1; seed 2 ends at 6, 6, 6, 5: 0.75
    assert grids.sensitivity(grid, "scratch", "adamw") == pytest.approx(0.25)
    assert grids.sensitivity(grid_of(*ADAMW, *GUARD[:3]), "scratch", "guard") is None
    assert grids.sensitivity(grid_of(ADAMW[0]), "scratch", "adamw") is None


def test_ratios_are_paired_by_seed_and_then_the_median():
    losses = {0: (4.0, 4.1), 1: (5.0, 5.0), 2: (6.0, 6.4)}
    lines = [record("lora", "adamw", 1, own, seed=s) for s, (own, _) in losses.items()]
    lines += [record("lora", "guard", 1, other, seed=s) for s, (_, other) in losses.items()]
    grid = grid_of(*lines)
    assert grids.ratio(grid, "lora", "guard", 1) == pytest.approx(math.exp(0.1))
    assert grids.perplexity(grid, "lora", "guard", 1) == pytest.approx(math.exp(5.0))


def test_a_diverged_run_is_infinite():
    assert grids.perplexity(grid_of(*ADAMW), "scratch", "adamw", 30) == math.inf


def test_pace_is_the_share_of_adamws_steps():
    # AdamW ends at 3.0 at its point 3; the guard passes 3.0 half way from point 1 to point 2.
    grid = grid_of(*ADAMW, *GUARD)
    assert grids.pace(grid, "scratch", "guard", 1) == pytest.approx(1.5 / 3)
    assert grids.pace(grid, "scratch", "adamw", 1) == pytest.approx(1.0)


def test_a_record_may_hold_its_pace_instead_of_its_curve():
    """None is one that AdamW's final loss is beyond."""
    by_seed = [{"pace": 0.5}, {"pace": None}, {"pace": 0.75}]
    lines = [record("scratch", "adamw", 1, 4.0, seed=seed) for seed in range(3)]
    for seed, pace in enumerate(by_seed):
        line = record("scratch", "guard", 1, 4.1, seed=seed) | pace
        del line["valid_curve"]
        lines.append(line)
    assert grids.pace(grid_of(*lines), "scratch", "guard", 1) == 0.75
    assert grids.pace(grid_of(*lines[:5]), "scratch", "guard", 1) == math.inf


@pytest.mark.parametrize(
    ("curve", "point"),
    [([3.0], 1), ([9.0, None, 2.0], 3), ([9.0, 4.0], math.inf), ([None, None], math.inf)],
)
def test_where_a_curve_meets_its_target(curve, point):
    assert reached(curve, 3.0) == point


def test_the_newest_line_of_a_cell_counts_and_other_models_do_not():
    older = record("lora", "adamw", 1, 9.0)
    other = record("lora", "adamw", 3, 9.0, size="other")
    grid = grid_of(older, other, record("lora", "adamw", 1, 4.0))
    assert list(grid.cells) == [("lora", "adamw", 1, 0)]
    assert grid.losses("lora", "adamw", 1) == {0: pytest.approx(4.0)}


def test_laws_are_not_mixed():
    old = [record("lora", "guard", k, 4.0, law="old") for k in (1, 3)]
    new = [record("lora", "guard", k, 4.2, law="new") for k in (3, 10)]
    assert list(grid_of(*old, *new[:1]).cells) == [("lora", "guard", k, 0) for k in (1, 3)]
    assert list(grid_of(*old, *new).cells) == [("lora", "guard", k, 0) for k in (3, 10)]


def test_rates_that_were_only_tried_are_no_cell():
    grid = grid_of(*ADAMW, record("scratch", "adamw", 2, 3.0) | {"tuned": None})
    assert grid.multiples("scratch") == [1, 3, 10, 30]


def everything(guard_loss, *, prodigy_loss=4.3, cuts=0):
    """A whole grid: AdamW as above everywhere, the guard equally good at every rate."""
    lines = []
    for regime in REGIMES.values():
        for k in regime.multiples:
            lines.append(record(regime.name, "adamw", k, 4.0 if k == 1 else 5.0))
            lines.append(record(regime.name, "guard", k, guard_loss, curve=(5, 3, 2)))
            lines[-1]["guard"] |= {"cuts": cuts}
            lines.append(record(regime.name, "guard-chained", k, 5.02))
        lines.append(record(regime.name, "prodigy", None, prodigy_loss))
    return grid_of(*lines)


def test_targets_by_hand():
    measured = {t.title: t for t in targets.targets(everything(4.02, cuts=1))}
    values = [target.measured for target in measured.values()]
    ratio = math.exp(0.02)
    # Peers in the last regime above its tuned rate: AdamW 5.0, Prodigy 4.3.
    against_peers, worst_cell = math.exp(4.02 - 4.3), math.exp(4.02 - 4.3)
    assert values[:6] == pytest.approx([ratio] * 4 + [against_peers, worst_cell])
    assert values[6] == pytest.approx(0, abs=1e-9)  # the guard's S is 0
    assert values[7] == pytest.approx(2 / 3)  # AdamW's 3.0 is reached at point 2 of 3
    assert values[8] == pytest.approx(10.0)  # a cut in each run of 100 steps
    assert values[9] == pytest.approx(math.exp(1.02))  # at the tuned rate, where AdamW's is 4.0
    verdicts = [target.verdict for target in measured.values()]
    assert verdicts[:4] == ["missed", "must reached", "must reached", "must reached"]
    assert verdicts[4:] == ["aim reached"] * 4 + ["missed"] * 2


def test_a_target_with_a_missing_cell_is_not_measured():
    whole = everything(4.0)
    del whole.cells["full", "guard", 100, 0]
    verdicts = {t.title: t.verdict for t in targets.targets(whole)}
    missing = [title for title, verdict in verdicts.items() if verdict == "not measured"]
    assert [title.split(",")[0] for title in missing] == [
        "fine-tuning",
        "worst cell of all: guard ÷ best rate-free peer",
        "S",
    ]


def test_the_best_of_a_column_is_bold_and_a_diverged_one_says_so():
    rows = rows_of(tables.perplexity_table(grid_of(*ADAMW, *GUARD), "scratch"))
    assert rows["AdamW"] == [
        f"**{math.exp(4.0):.2f}**",
        f"{math.exp(4.5):.2f}",
        "1096.63",
        "diverged",
    ]
    assert rows["guard"] == [
        f"{math.exp(4.1):.2f}",
        *(f"**{math.exp(x):.2f}**" for x in (4.1, 4.2, 4.2)),
    ]


def test_a_control_is_no_peer_and_the_seed_of_the_tuning_is_not_in_the_table():
    nudged = record("scratch", "adamw-nudged", 1, 3.0)
    tuning = record("scratch", "adamw", 1, 9.0, seed=7)
    grid = grid_of(*ADAMW, nudged, tuning)
    assert "adamw-nudged" in grid.methods("scratch")
    assert targets.peers(grid, "scratch") == ["adamw"]
    assert grid.losses("scratch", "adamw", 1) == {0: 4.0}


def test_the_spread_is_half_the_range_over_seeds():
    grid = grid_of(
        *(record("lora", "adamw", 1, math.log(p), seed=s) for s, p in enumerate((30, 31, 34)))
    )
    assert rows_of(tables.perplexity_table(grid, "lora"))["AdamW"] == ["**31.00 ± 2.00**"]


def test_a_method_without_a_rate_stands_in_every_column():
    grid = grid_of(*ADAMW, record("scratch", "prodigy", None, 4.2))
    rows = rows_of(tables.perplexity_table(grid, "scratch"))
    assert {entry.strip("*") for entry in rows["Prodigy"]} == {f"{math.exp(4.2):.2f}"}


def test_cells_that_a_peer_wins_are_named():
    text = tables.lost_cells(grid_of(*ADAMW, *GUARD))
    assert "×1: 1 peers, best AdamW (54.60; the guard 60.34)" in text
    assert "×3" not in text
    assert "nowhere" in tables.lost_cells(grid_of(*ADAMW))


def test_the_report_is_written_for_both_splits(tmp_path):
    results, out = tmp_path / "r.jsonl", tmp_path / "OUT.md"
    results.write_text("".join(json.dumps(line) + "\n" for line in [*ADAMW, *GUARD]))
    pages = []
    for split in ("valid", "test"):
        tables.main(["--results", str(results), "--out", str(out), "--split", split])
        pages.append(out.read_text())
    assert "Final valid perplexity" in pages[0]
    assert "Final test perplexity after 100 steps, from 403.43 before the first" in pages[1]
    assert out.with_suffix(".png").is_file()


def test_without_results_it_says_what_to_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main(["--results", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2
    assert "python -m benchmarks.stress" in capsys.readouterr().err


def rows_of(table):
    """The rows of a Markdown table by their first column."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells[2:]}


def with_peers(losses):
    """A grid from scratch: AdamW, the guard, and peers that end at these losses at every rate."""
    lines = [line for peer, loss in losses.items() for line in scratch(peer, [loss] * 4)]
    return grid_of(*ADAMW, *GUARD, *lines)


PEERS = {"zclip": 4.6, "agc": 4.3, "spam": None, "adagc": 4.2, "stable-spam": 4.4}


def test_the_best_peers_have_a_colour_and_a_shape_of_their_own():
    grid = with_peers({**PEERS, "guard-chained": 4.0})
    assert figure.best_peers(grid) == ["adagc", "agc", "stable-spam"]
    looks = figure._looks(grid)
    assert list(looks) == ["guard", "adamw", "adagc", "agc", "stable-spam"]
    for part in ("color", "marker"):
        assert len({look[part] for look in looks.values()}) == len(looks)


def test_a_peer_with_a_missing_cell_is_none_of_the_best():
    grid = with_peers(PEERS)
    del grid.cells["scratch", "adagc", 30, 0]
    assert figure.best_peers(grid) == ["agc", "stable-spam", "zclip"]


def test_the_rest_is_grey_and_has_one_entry_in_the_legend():
    grid, panel = with_peers(PEERS), Figure().subplots()
    figure._panel(panel, grid, "scratch", figure._looks(grid))
    grey = [line for line in panel.get_lines() if line.get_color() == colours.GREY_LINE]
    assert len(grey) == 2  # ZClip, SPAM
    assert {line.get_label() for line in grey} == {figure.REST}

"""Tables and figure from the result file of `python -m benchmarks.stress`.

    python -m benchmarks.stress.tables          # writes benchmarks/STRESS.md and STRESS.png

What the numbers mean is said in `benchmarks.stress.grid` and above each table.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.markdown import numbers
from benchmarks.records import law_named, made_with
from benchmarks.stress import figure
from benchmarks.stress.grid import (
    Grid,
    Record,
    false_interventions,
    load,
    pace,
    perplexity,
    ratio,
    sensitivity,
)
from benchmarks.stress.methods import METHODS
from benchmarks.stress.regimes import LONGER, REGIMES
from benchmarks.stress.run import RESULTS, long_results
from benchmarks.stress.targets import peers, targets, to_bare
from train.provenance import commits


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress.tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file, JSON Lines")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "STRESS.md")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    options = parser.parse_args(arguments)
    grid = load(records.read(options.results), options.split)
    if not grid.cells:
        parser.exit(2, f"{options.results} holds no cell: run python -m benchmarks.stress first\n")
    picture = options.out.with_suffix(".png")
    text = page(options.results, options.split, picture.name)
    options.out.write_text(text, encoding="utf-8")
    figure.draw(grid, picture)
    print(f"wrote {options.out} and {picture}")


def page(results: Path, split: str, picture: str) -> str:
    """The whole page, with the long runs where there are any."""
    parts = [report(load(records.read(results), split), picture)]
    longer = load(records.read(long_results(results)), split)
    if longer.cells:
        parts.append(longer_runs(longer))
    return "\n".join(parts)


def report(grid: Grid, picture: str) -> str:
    parts = ["# Stress benchmark", _provenance(grid), f"![Perplexity over rate]({picture})"]
    parts += ["## Targets", target_table(grid), noise(grid), lost_cells(grid)]
    for regime in grid.regimes():
        parts += [f"## {REGIMES[regime].title}", _about(grid, regime)]
        parts += [perplexity_table(grid, regime)]
        parts += ["Steps to AdamW's final loss at its tuned rate, over AdamW's own:"]
        parts += [pace_table(grid, regime)]
    parts += ["## LR sensitivity S", _SENSITIVITY, sensitivity_table(grid)]
    parts += ["## Interventions of the guard", _INTERVENTIONS, intervention_table(grid)]
    parts += ["## Time", "Seconds a run, with its compilation and evaluation.", time_table(grid)]
    return "\n\n".join(parts) + "\n"


_SENSITIVITY = (
    "Mean over the rates of min(loss, loss before training), less the method's best loss. "
    "It says nothing of how good that best loss is."
)
_INTERVENTIONS = (
    "Events the guard reports; cuts of the scale below 0.9 after the soft start, which ends at "
    "0.9 or half way; skips; share of steps below 0.9; smallest and last scale."
)
_LONGER = (
    "The last two targets above count by the run, not by the step: a soft start of some steps puts "
    "the guard so many behind AdamW, and one cut at the peak of a warm-up is one however long the "
    "run is. This is what they come to in longer runs "
    "(`python -m benchmarks.stress --long --methods adamw guard --lrs 1`). Where the share of "
    "steps below 0.9 is 0 the guard has done next to nothing since its soft start, and what is "
    "left is how far two runs drift apart."
)


def _provenance(grid: Grid) -> str:
    newest = _newest(grid)
    shape = newest["model"]
    return (
        f"Data: {newest['data']}; tokenizer: {newest['tokenizer']}. Model: "
        f"{shape['num_hidden_layers']} layers, {shape['hidden_size']} wide; sequences of "
        f"{newest['length']}, batch {newest['batch_size']}. ± is half the range; **bold** is the "
        f"best of a column. {_made_at(grid)}\n\nMade by `python -m benchmarks.stress` and "
        "`python -m benchmarks.stress.tables`. Every peer runs at its published constants, which "
        "are made for longer runs (see `benchmarks/stress/methods.py`)."
    )


def _made_at(grid: Grid) -> str:
    newest = _newest(grid)
    seeds = ", ".join(str(seed) for seed in sorted({key[3] for key in grid.cells}))
    cells = grid.cells.values()
    return (
        f"Medians over seeds (here {seeds}); {len(cells)} cells at commit {commits(cells)}"
        f"{law_named(cells)}; {made_with(cells, newest)}."
    )


def _newest(grid: Grid) -> Record:
    return max(grid.cells.values(), key=lambda record: len(record["versions"]))


def _about(grid: Grid, regime: str) -> str:
    before = statistics.median(
        record["before"][grid.split] for key, record in grid.cells.items() if key[0] == regime
    )
    return (
        f"Final {grid.split} perplexity after {grid.steps(regime)} steps, from {before:.2f} "
        f"before the first. ×1 is AdamW's tuned learning rate, {grid.tuned[regime]:g}."
    )


def longer_runs(grid: Grid) -> str:
    """AdamW and the guard in runs of more steps, whose tuned rates are their own."""
    parts = [f"## {LONGER} times as many steps", _LONGER, longer_table(grid), _made_at(grid)]
    return "\n\n".join(parts) + "\n"


def longer_table(grid: Grid) -> str:
    multiples = sorted({k for regime in grid.regimes() for k in grid.multiples(regime)})
    rows = []
    for regime in grid.regimes():
        ratios = [_number(ratio(grid, regime, "guard", k), 3) for k in multiples]
        tuned = [record["guard"] for record in grid.records(regime, "guard", 1).values()]
        rows.append(
            [
                REGIMES[regime].title,
                f"{grid.steps(regime)}",
                f"{grid.tuned[regime]:g}",
                *ratios,
                _number(pace(grid, regime, "guard", 1), 2),
                _middle(guard["soft_start"] for guard in tuned),
                _middle(guard["share_below"] for guard in tuned),
                _number(false_interventions(grid, "guard", [regime]), 2),
            ]
        )
    together = false_interventions(grid, "guard", grid.regimes())
    rows.append(["all", *[""] * (len(multiples) + 5), _number(together, 2)])
    head = ["", "steps", "tuned rate", *(f"guard ÷ tuned AdamW ×{k}" for k in multiples)]
    last = ["steps to AdamW's final loss, over its own", "soft start, steps"]
    last += ["share below 0.9 after", "false interventions per 1000"]
    return numbers([*head, *last], rows)


def target_table(grid: Grid) -> str:
    rows = [
        [t.title, f"≤ {t.must:g}", f"≤ {t.aim:g}", _number(t.measured, 3), t.verdict]
        for t in targets(grid)
    ]
    return numbers(["worst of its kind", "must", "aim", "measured", ""], rows)


def noise(grid: Grid) -> str:
    """How far two runs of AdamW drift apart that differ by less than a rounding."""
    worst = to_bare(grid, "adamw-nudged")
    if worst is None:
        return ""
    tuned = max(ratio(grid, regime, "adamw-nudged", 1) or 1.0 for regime in grid.regimes())
    return (
        "What differs less than the noise differs by nothing. AdamW at a rate that is larger by "
        f"one part in four million ends at {tuned:.3f} times AdamW in the worst regime at its "
        f"tuned rate, and at {worst:.3f} times in the worst cell above it."
    )


def lost_cells(grid: Grid) -> str:
    """Every cell in which a peer ends better than the guard, said in words."""
    lost = []
    for regime in grid.regimes():
        for multiple in grid.multiples(regime):
            own = perplexity(grid, regime, "guard", multiple)
            values = {
                peer: perplexity(grid, regime, peer, multiple) for peer in peers(grid, regime)
            }
            better = {p: v for p, v in values.items() if v is not None and own and v < own}
            if better:
                best = min(better, key=better.__getitem__)
                lost.append(
                    f"- {REGIMES[regime].title} ×{multiple}: {len(better)} peers, best "
                    f"{METHODS[best].title} ({better[best]:.2f}; the guard {own:.2f})"
                )
    return "\n".join(["Where a peer ends better than the guard:\n", *(lost or ["- nowhere"])])


SHORT = (
    *("adamw", "clip-1.0", "agc", "zclip", "stable-spam", "stable-adamw", "momo-adam"),
    *("prodigy", "dadapt-adamw", "schedule-free", "guard"),
)


def short_table(grid: Grid, multiples: tuple[int, ...] = (1, 10, 30)) -> str:
    """Perplexity over that of AdamW at its tuned rate, in all regimes, for the best-known."""
    columns = [(regime, multiple) for regime in grid.regimes() for multiple in multiples]
    entries = []
    for regime, multiple in columns:
        shares = [ratio(grid, regime, method, multiple) for method in SHORT]
        entries.append(_bold_smallest([x and (round(x, 2), f"{x:.2f}") for x in shares]))  # type: ignore[misc]
    rows = zip([METHODS[method].title for method in SHORT], *entries, strict=True)
    return numbers(["", *(f"{REGIMES[r].title} ×{k}" for r, k in columns)], rows)


def perplexity_table(grid: Grid, regime: str) -> str:
    def entry(method: str, multiple: int) -> tuple[float, str] | None:
        losses = grid.losses(regime, method, multiple).values()
        middle = perplexity(grid, regime, method, multiple)
        if middle is None:
            return None
        if math.isinf(middle):
            return middle, "diverged"
        spread = f" ± {(math.exp(max(losses)) - math.exp(min(losses))) / 2:.2f}"
        return middle, f"{middle:.2f}" + (spread if len(losses) > 1 else "")

    return _by_multiple(grid, regime, entry)


def pace_table(grid: Grid, regime: str) -> str:
    def entry(method: str, multiple: int) -> tuple[float, str] | None:
        share = pace(grid, regime, method, multiple)
        return None if share is None or math.isinf(share) else (share, f"{share:.2f}")

    return _by_multiple(grid, regime, entry)


def _by_multiple(
    grid: Grid, regime: str, entry: Callable[[str, int], tuple[float, str] | None]
) -> str:
    """Methods by multiples of the tuned rate; the smallest value of a column is bold."""
    methods, multiples = grid.methods(regime), grid.multiples(regime)
    columns = [_bold_smallest([entry(method, k) for method in methods]) for k in multiples]
    rows = zip([METHODS[method].title for method in methods], *columns, strict=True)
    return numbers(["", *(f"×{k}" for k in multiples)], rows)


def _bold_smallest(entries: list[tuple[float, str] | None]) -> list[str]:
    smallest = min((entry[0] for entry in entries if entry), default=0.0)
    return [
        "–" if entry is None else f"**{entry[1]}**" if entry[0] == smallest else entry[1]
        for entry in entries
    ]


def sensitivity_table(grid: Grid) -> str:
    present = {key[1] for key in grid.cells}
    methods = [name for name in METHODS if METHODS[name].takes_lr and name in present]
    columns = []
    for regime in grid.regimes():
        values = [sensitivity(grid, regime, method) for method in methods]
        columns.append(_bold_smallest([None if s is None else (s, f"{s:.3f}") for s in values]))
    rows = zip([METHODS[method].title for method in methods], *columns, strict=True)
    return numbers(["", *(REGIMES[regime].title for regime in grid.regimes())], rows)


def intervention_table(grid: Grid) -> str:
    keys = ("events", "cuts", "skips", "share_below", "smallest", "last")
    rows = []
    for regime in grid.regimes():
        for method in grid.methods(regime):
            for multiple in grid.multiples(regime):
                found = grid.records(regime, method, multiple).values()
                if METHODS[method].guarded and found:
                    cell = [REGIMES[regime].title, METHODS[method].title, f"×{multiple}"]
                    rows.append(cell + [_middle(r["guard"][key] for r in found) for key in keys])
    return numbers(["", "", "", *(key.replace("_", " ") for key in keys)], rows)


def time_table(grid: Grid) -> str:
    rows = []
    for name, method in METHODS.items():
        times = [
            [r["seconds"] for key, r in grid.cells.items() if key[:2] == (regime, name)]
            for regime in grid.regimes()
        ]
        if any(times):
            rows.append([method.title, *(_middle(column) for column in times)])
    return numbers(["", *(REGIMES[regime].title for regime in grid.regimes())], rows)


def _middle(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.median(found):.3g}" if found else "–"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()

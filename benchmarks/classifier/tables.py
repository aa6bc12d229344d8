"""The measured parts of docs/prediction.md, from the result file."""

import json
from pathlib import Path
from typing import Any

from benchmarks.classifier import tasks
from benchmarks.markdown import numbers
from benchmarks.records import FOLDER, law_named
from lbw_optax.law.classifier import HORIZONS, Kind
from train.provenance import made_at

RESULTS, ADAPTED = FOLDER / "classifier.json", FOLDER / "classifier_adapted.json"
TITLES = {"made": "made runs", "real": "real logs"}


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The result file."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def targets() -> str:
    """What was to be reached, and what was."""
    result = read()
    ours = result["predictors"]["classifier"]
    made, real = ours["matched"]["made"], ours["matched"]["real"]
    error = max(x["error"] for kind in ("made", "real") for x in result["calibration"][kind])
    balanced = result["kinds"]["balanced"]
    auroc = {kind: ours["ranking"][kind][0][0] for kind in ("made", "real")}
    rows = [
        _target(
            "false alarms on healthy real logs, in 100,000 steps", real["false_alarms"], "≤ 10"
        ),
        _target("divergences caught at that threshold, made runs", 100 * made["caught"], "≥ 80 %"),
        _target("median lead there, steps", made["lead"], "≥ 8"),
        _target("AUROC within 10 steps, made runs", auroc["made"], "≥ 0.95"),
        _target("AUROC within 10 steps, real logs", auroc["real"], "≥ 0.90"),
        _target("worst expected calibration error", error, "≤ 0.05"),
        _target("hard batch told from unstable dynamics, balanced", balanced, "≥ 0.85"),
    ]
    sizes = result["sizes"]["unseen"]
    of = "; ".join(
        f"{title}: {sizes[kind]['runs']:,} runs of {sizes[kind]['steps']:,} steps, "
        f"{sizes[kind]['diverge']} diverge"
        for kind, title in (("made", "made here"), ("real", "real logs"))
    )
    made_by = f"`python -m benchmarks.classifier judge` at {made_at([result])}{law_named([result])}"
    shown = numbers(["", "target", "measured", ""], rows)
    return f"{shown}\n\n{of}. {made_by}; {result['seconds']:.0f} s."


def _target(title: str, value: float, wanted: str) -> list[str]:
    sign, limit = wanted.split()[:2]
    reached = value <= float(limit) if sign == "≤" else value >= float(limit)
    return [title, wanted, f"{value:.3g}", "reached" if reached else "**missed**"]


def leaderboard() -> str:
    """Every predictor at one rate of false alarms, and as it was published."""
    result = read()
    head = [
        "",
        "AUROC 10",
        "AP 10",
        "AUROC 50",
        "caught",
        "lead",
        "before the rise",
        "real: caught",
    ]
    head += ["false alarms"]
    rows = []
    for row in result["predictors"].values():
        made, real = row["matched"]["made"], row["matched"]["real"]
        soon, later = row["ranking"]["made"]
        cells = [_plain(soon[0]), _plain(soon[1]), _plain(later[0])]
        rows.append([row["title"], *cells, *_judged(made), *_real(real)])
    published = [
        [
            row["title"],
            _plain(row["published"]["made"]["threshold"]),
            *_judged(row["published"]["made"]),
            *_real(row["published"]["real"]),
        ]
        for row in result["predictors"].values()
        if "published" in row
    ]
    there = ["", "threshold", "caught", "lead", "before the rise", "real: caught", "false alarms"]
    return (
        f"{numbers(head, rows)}\n\nAt the thresholds that were published:\n\n"
        f"{numbers(there, published)}"
    )


def families() -> str:
    """The classifier by family and workload, and by what befell the run."""
    result = read()
    head = ["", "runs", "diverge", "caught", "lead", "AUROC 10", "false alarms"]

    def row(name: str, x: dict[str, Any]) -> list[str]:
        return [
            name,
            f"{x['runs']:,}",
            str(x["divergences"]),
            _share(x["caught"]),
            _plain(x["lead"]),
            _plain(x["auroc"][0]),
            _plain(x["false_alarms"]),
        ]

    of = {True: "real: ", False: ""}
    rows = [row(of[x["real"]] + name, x) for name, x in result["families"].items()]
    faults = [row(tasks.TITLES[name], x) for name, x in result["faults"].items()]
    return f"{numbers(head, rows)}\n\n{numbers(['what befell it', *head[1:]], faults)}"


def calibration() -> str:
    """How often what was said with a probability came about."""
    result = read()
    rows = [
        [f"{TITLES[kind]}, within {horizon}", f"{found['error']:.4f}", _bins(found["bins"])]
        for kind in TITLES
        for horizon, found in zip(HORIZONS, result["calibration"][kind], strict=True)
    ]
    counts = result["kinds"]["counts"]
    names = [kind.name.lower().replace("_", " ") for kind in Kind]
    kinds = [[name, *(f"{n:,}" for n in row)] for name, row in zip(names, counts, strict=True)]
    return (
        f"{numbers(['', 'error', 'said → came about (steps)'], rows)}\n\n"
        f"{numbers(['is ↓, said to be →', *names], kinds)}"
    )


def adapted() -> str:
    """The classifier as it is shipped, and the one that goes on learning in each run."""
    result = read(ADAPTED)
    shipped, learning, cost = result["shipped"], result["adapted"], result["cost"]
    columns = [
        _column(shipped, "matched", cost["shipped"]),
        _column(learning, "matched", cost["adapted"]),
        _column(shipped, "other", cost["shipped"]),
        _column(learning, "other", cost["adapted"]),
    ]
    head = ["", "as shipped", "learning", "as shipped", "learning"]
    shown = numbers(head, [[title, *(x[title] for x in columns)] for title in columns[0]])
    made_by = f"`python -m benchmarks.classifier adapt` at {made_at([result])}{law_named([result])}"
    return f"{shown}\n\n{made_by}; {result['seconds']:.0f} s."


def _column(judged: dict[str, Any], threshold: str, cost: float) -> dict[str, str]:
    at = judged[threshold]
    found = {"threshold": f"{at['made']['threshold']:.3f}"}
    for kind, title in TITLES.items():
        found |= {
            f"{title}: false alarms in 100,000 healthy steps": _plain(at[kind]["false_alarms"]),
            f"{title}: caught": _share(at[kind]["caught"]),
            f"{title}: lead": _plain(at[kind]["lead"]),
        }
        for i, horizon in enumerate(HORIZONS):
            auroc, precision = judged["ranking"][kind][i]
            error = judged["calibration"][kind][i]["error"]
            found |= {
                f"{title}: AUROC {horizon}": f"{auroc:.4f}",
                f"{title}: AP {horizon}": f"{precision:.4f}",
                f"{title}: calibration error {horizon}": f"{error:.4f}",
            }
    return found | {"µs a step of the classifier, compiled": f"{cost:.1f}"}


def _bins(rows: list[list[float]]) -> str:
    return ", ".join(f"{said:.2f} → {share:.2f} ({count:,})" for said, share, count in rows)


def _judged(x: dict[str, Any]) -> list[str]:
    return [_share(x["caught"]), _plain(x["lead"]), _plain(x["lead_to_rise"])]


def _real(x: dict[str, Any]) -> list[str]:
    # What reads nothing of a log neither catches nor alarms.
    if not (x["caught"] or x["false_alarms"]):
        return ["–", "–"]
    return [_share(x["caught"]), _plain(x["false_alarms"])]


def _share(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f} %"


def _plain(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"

"""The report itself: one HTML file that needs nothing but itself."""

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from lbw_optax.report import charts, frozen, heat, layers, words
from lbw_optax.report.diagnosis import Finding, of_columns
from lbw_optax.report.reading import Run, kept, steps, watches

# What a file of ours begins with; nothing else is ever overwritten.
BEGINNING = "<!doctype html><!-- lbw-report -->"
# So many interventions of a run are in the table: the first ones and the last.
ROWS = 60
# No page is larger than this, bytes, while there is detail to leave out.
LARGEST = 300_000


class Told(NamedTuple):
    """A run and what is to be said of it.

    Attributes:
      run: the run.
      story: one paragraph.
      marks: of the time line: the lines of its audit log, or what a guard would have seen.
    """

    run: Run
    story: str
    marks: list[dict[str, Any]]


def page(told: Sequence[Told]) -> str:
    """The whole page, for one run or for several that are compared."""
    for detail in (1.0, 0.7, 0.5, 0.35, 0.25):
        made = _page(told, detail)
        if len(made.encode()) <= LARGEST:
            break
    return made


def _page(told: Sequence[Told], detail: float) -> str:
    runs = [x.run for x in told]
    x = charts.extent(runs)
    names = ", ".join(run.name for run in runs)
    body = [f"<header><h1>{escape(names)}</h1></header><main>"]
    body += [_story(one, i, len(told)) for i, one in enumerate(told)]
    body += [_numbers(runs)]
    body += [_legend(runs)] if len(runs) > 1 else []
    for i, one in enumerate(told):
        body += [charts.time_line(one.run, one.marks, i, x, detail)]
    for chart in charts.CHARTS:
        body += [charts.curves(chart, runs, x, detail)]
        if chart.column == "gradient_norm":
            body += heat.pictures(runs, x, detail)
        if chart.column == "attention_logit":
            body += layers.pictures(runs, x, detail)
            body += frozen.pictures(runs, x, detail)
    body += [_key(told), *(_table(run) for run in runs), _complaints(runs), "</main>"]
    style, script = (_part(name) for name in ("page.css", "page.js"))
    return (
        f'{BEGINNING}<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light '
        f'dark"><title>{escape(names)}: what happened</title><style>{style}</style></head><body>'
        f'{_PATTERNS}{"".join(body)}<div id="tip" role="status" hidden></div>'
        f"<script>{script}</script></body></html>\n"
    )


def _part(name: str) -> str:
    return resources.files("lbw_optax.report").joinpath(name).read_text(encoding="utf-8")


def tell(run: Run) -> Told:
    """Of a guarded run what the guard did, of another what one would have seen.

    Raises:
      ValueError: if there is nothing in its log that can be told or drawn.
    """
    drawn = {chart.column for chart in charts.CHARTS} & run.columns.keys()
    if run.guarded or (drawn and not drawn & {"loss", "gradient_norm"}):
        return Told(run, words.paragraph(run), run.audit)
    found = of_columns(run.columns, run.name)
    marks = [_mark(x) for x in found.findings]
    return Told(run, f"A run without the guard. {found.sentence}", marks)


def _mark(found: Finding) -> dict[str, Any]:
    """As a line of an audit log would have it."""
    line: dict[str, Any] = {"step": found.step, "signal": found.signal, "action": "seen"}
    if found.signal == "rollback":
        return line | {"signal": found.reason, "action": "asked"}
    if found.times > 1:
        line |= {"count": found.times, "last_step": found.last_step}
    return line | {"value": found.value, "threshold": found.threshold}


def _story(told: Told, style: int, runs: int) -> str:
    heading = f"<h2>{_sample(style)} {escape(told.run.name)}</h2>" if runs > 1 else ""
    return f'<section class="story">{heading}<p>{escape(told.story)}</p></section>'


def _numbers(runs: Sequence[Run]) -> str:
    """What it came to, and what it cost."""
    rows = [[run.name, *_cost(run)] for run in runs]
    shown = [i for i in range(len(_HEAD)) if any(row[i] for row in rows)]
    head = "".join(f"<th scope=col>{escape(_HEAD[i])}</th>" for i in shown)
    lines = "".join(
        "<tr>"
        + "".join(
            f"<th scope=row>{escape(row[i])}</th>" if i == 0 else f"<td>{escape(row[i])}</td>"
            for i in shown
        )
        + "</tr>"
        for row in rows
    )
    return (
        '<section><h2>What it came to, and what it cost</h2><div class="wide"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div></section>"
    )


_HEAD = (
    *("run", "steps", "first loss", "lowest loss", "last loss", "last scale", "skipped steps"),
    *("times back", "steps made again", "steps lost, of all made", "time lost"),
    "a restart from the start instead",
)


def _cost(run: Run) -> list[str]:
    """In the order of the table's head; "" for what is not known."""
    step, total = steps(run.columns), words.counts(run.audit)
    loss = run.columns.get("loss", np.zeros(0))
    if len(loss):
        loss = loss[kept(step)]
    finite = loss[np.isfinite(loss)]
    given = loss[~np.isnan(loss)]
    scale = run.columns.get("scale", np.zeros(0))
    scale = scale[np.isfinite(scale)]
    again, seconds = words.run_again(run)
    lost = again + words.skips_that_stayed(run.audit)
    backs = [line for line in run.audit if line["action"] == "rollback"]
    restart = sum(x for line in backs if type(x := line.get("from_step")) is int)
    made = len(step)
    one = seconds / again if again else math.nan
    return [
        f"{step.max() - step.min() + 1:,.0f}" if made else "",
        words.number(finite[0]) if len(finite) else "",
        words.number(finite.min()) if len(finite) else "",
        (words.number(given[-1]) if np.isfinite(given[-1]) else "not finite") if len(given) else "",
        words.number(scale[-1]) if len(scale) else "",
        f"{total['skip']:,}" if run.guarded else "",
        f"{total['rollback']:,}" if run.guarded else "",
        f"{again:,}" if made and (again or run.guarded) else "",
        f"{lost:,} ({100 * lost / made:.2g} %)" if made and (again or run.guarded) else "",
        _duration(lost * one) if lost and not math.isnan(one) else "",
        f"{restart:,} steps" if restart else "",
    ]


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(600), _duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 6000 else f"{seconds / 3600:.2g} h"


def _sample(style: int) -> str:
    kind = f"r{style % charts.STYLES}"
    return (
        '<svg class="sample" viewBox="0 0 44 14" aria-hidden="true"><path class="line '
        f'{kind}" d="M2 7H42"/><path class="shape {kind}" '
        f'd="{charts.MARKERS[style % charts.STYLES].format(22.0, 7.0)}"/></svg>'
        f"<b>{style + 1}</b>"
    )


def _legend(runs: Sequence[Run]) -> str:
    items = "".join(f"<li>{_sample(i)} {escape(run.name)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend" aria-label="Runs">{items}</ul>'


def _key(told: Sequence[Told]) -> str:
    """What the marks and hatchings mean, as far as they occur."""
    used = {line["action"] for one in told for line in one.marks}
    items = [
        f'<li><svg class="sample" viewBox="0 0 14 14" aria-hidden="true"><path class="mark '
        f'{action}" d="{shape.format(7.0, 7)}"/></svg> {escape(title)}</li>'
        for action, (title, shape) in charts.LANES.items()
        if action in used
    ]
    items += [
        f'<li><svg class="sample" viewBox="0 0 44 14" aria-hidden="true"><rect class="regime '
        f'{regime}" x="1" y="1" width="42" height="12"/></svg> {regime}</li>'
        for regime in charts.WORST_FIRST
        if any(regime in one.run.columns.get("regime", ()) for one in told)
    ]
    items += [
        f'<li><svg class="sample" viewBox="0 0 44 14" aria-hidden="true"><path class="{kind} r0" '
        f'd="M2 7H42"/></svg> {title}</li>'
        for kind, title in _strokes([one.run for one in told])
    ]
    lines = [
        "Each picture keeps the least and the largest number of every place: no spike is lost. "
        "A cross at the upper edge is a number that is not finite. An arrow leads from the step "
        "that was left to that gone back to. A number beside a mark is of how many it stands for. "
        "Thresholds are as they were recorded, at every step or where one was passed. Steps of "
        "interventions are the guard's own count, from 0, as that of the batches; a line of the "
        "log counts the updates made: what was done in step 30 is in the log at step 31.",
        "Keys: Tab to a lane of marks, left and right in it; a mark shows its line of the audit "
        "log. Left and right in a chart move the reading.",
    ]
    said = "".join(f"<p>{line}</p>" for line in lines)
    return (
        f'<section><h2>How to read it</h2><ul class="legend">{"".join(items)}</ul>{said}</section>'
    )


def _strokes(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the kinds of lines mean, as far as they occur: class of the style sheet, and words."""
    drawn = [
        (chart, line)
        for chart in charts.CHARTS
        for run in runs
        for line in charts.lines_of(chart, run, 0, 1)
    ]
    has_mean = any(charts.has_mean(chart, line) for chart, line in drawn)
    kinds = [
        ("raw", "a number of each step", has_mean),
        ("line", "its moving mean, over a sixtieth of the run", has_mean),
        ("threshold", "a threshold", any(len(line.threshold[0]) for _, line in drawn)),
        ("undone", "steps undone and made again", any(line.undone for _, line in drawn)),
    ]
    return [(kind, title) for kind, title, occurs in kinds if occurs]


def _table(run: Run) -> str:
    """The interventions in words, for reading and for printing."""
    if not run.audit:
        return ""
    shown = run.audit
    if len(shown) > 2 * ROWS:
        shown = [*shown[:ROWS], *shown[-ROWS:]]
    left_out = len(run.audit) - len(shown)
    acts = not watches(run)
    items = [f"<li>{escape(charts.said_of(line, acts=acts))}</li>" for line in shown]
    if left_out:
        items.insert(ROWS, f"<li>… {left_out:,} more, which the audit log has …</li>")
    title = f"{words.plural(len(run.audit), 'line')} of the audit log: {escape(run.name)}"
    return f"<details><summary>{title}</summary><ul>{''.join(items)}</ul></details>"


def _complaints(runs: Sequence[Run]) -> str:
    items = [f"<li>{escape(f'{run.name}: {x}')}</li>" for run in runs for x in run.complaints]
    if not items:
        return ""
    return f"<section><h2>What could not be read</h2><ul>{''.join(items)}</ul></section>"


# Hatchings of the regimes.
_PATTERNS = """<svg width="0" height="0" aria-hidden="true"><defs>
<pattern id="h-stressed" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path d="M0 0V6" class="hatch"/></pattern>
<pattern id="h-unstable" width="5" height="5" patternUnits="userSpaceOnUse"><path d="M0 0L5 5M5 0L0 5" class="hatch"/></pattern>
<pattern id="h-recovering" width="6" height="6" patternUnits="userSpaceOnUse"><circle cx="2" cy="2" r="1" class="dot"/></pattern>
</defs></svg>"""  # noqa: E501

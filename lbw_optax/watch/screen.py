"""What is shown of a run: one screen of lines, whatever the terminal's size."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lbw_optax import sentences
from lbw_optax.law.divergence import Reason
from lbw_optax.state import Mode
from lbw_optax.watch.following import Seen


class Shown(NamedTuple):
    """A number that has a line of its own.

    Attributes:
      label: what it is called on the screen.
      names: what logs call it, the first that is there counts.
      of_many: which of the values under one character is drawn: the telling extreme.
      is_told: whether a guard that was never told of it says 0.
    """

    label: str
    names: tuple[str, ...]
    of_many: Callable[[Sequence[float]], float] = max
    is_told: bool = False


SHOWN = (
    Shown("loss", ("loss", "train/loss", "train_loss")),
    Shown("scale", ("scale", "guard/scale"), min),
    Shown("learning rate", ("learning_rate", "lr")),
    Shown("gradient norm", ("gradient_norm", "grad_norm", "signals/gradient_norm")),
    Shown("relative step", ("relative_step", "signals/relative_step")),
    Shown("overshoot level", ("overshoot_level", "signals/overshoot_level")),
    Shown("risk", ("risk_10", "signals/risk_10")),
    Shown("frozen layers", ("frozen_groups", "guard/frozen_groups"), is_told=True),
    Shown("activation peak", ("activation_peak", "signals/activation_peak"), is_told=True),
    Shown("attention logit", ("attention_logit", "signals/attention_logit"), is_told=True),
    Shown("tokens a second", ("tokens_per_second",), min),
    Shown("valid perplexity", ("valid_perplexity",), min),
)
BARS = "▁▂▃▄▅▆▇█"
# A letter besides the colour, for those who see none.
REGIMES = {
    "nominal": ("n", "green"),
    "stressed": ("S", "yellow"),
    "unstable": ("U", "red"),
    "recovering": ("r", "cyan"),
}
LABEL, NUMBER = 17, 11
# Of each key: the order that it gives, and what it is called.
KEYS = {
    "h": ("hold", "hold the scale"),
    "f": ("release", "free it"),
    "o": ("observe", "observe"),
    "g": ("govern", "govern"),
    "b": ("rollback", "roll back"),
}
QUIT = "q"
HELP = "   ".join([*(f"{key} {said}" for key, (_, said) in KEYS.items()), f"{QUIT} quit"])
# A run that was silent for so many of its steps, and so many seconds, may have been killed.
SILENT_STEPS, SILENT_SECONDS = 20, 60


def screen(name: str, seen: Seen, said: str, now: float, width: int, events: int) -> Group:
    """The whole screen.

    Args:
      name: of the run.
      seen: how far it is.
      said: the last line: what the keys do, or what was just ordered.
      now: seconds since 1970.
      width: characters of a line.
      events: how many interventions are told at most.
    """
    if not seen.steps:
        return Group(Text(name, "bold"), Text("No step is in its log yet."), Text(said, "dim"))
    return Group(
        _head(name, seen, now),
        *_urgent(seen),
        _numbers(seen, width),
        Text(),
        *(_told(line, not _watches(seen)) for line in seen.audit[-events:] if events > 0),
        Text() if seen.audit else Text("No interventions yet.", "dim"),
        Text(said, "dim", overflow="ellipsis", no_wrap=True),
    )


def sparkline(
    values: Sequence[float], width: int, of_many: Callable[[Sequence[float]], float] = max
) -> str:
    """One character for each of `width` stretches, between the least and the largest value.

    "x" stands for a number that is not finite, a blank where there is none.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8)
    '▁▂▃▄▅▆▇█'
    >>> sparkline([0, 0, 7, 0], 2)
    '▁█'
    """
    drawn = [_of_stretch(part, of_many) for part in stretches(values, width)]
    finite = [x for x in drawn if math.isfinite(x)]
    if not finite:
        return "x" * len(drawn) if drawn and any(math.isinf(x) for x in drawn) else ""
    least, span = min(finite), max(finite) - min(finite)

    def character(x: float) -> str:
        if math.isnan(x):
            return " "
        if math.isinf(x):
            return "x"
        return BARS[round((len(BARS) - 1) * (x - least) / span)] if span > 0 else BARS[0]

    return "".join(character(x) for x in drawn)


def stretches(values: Sequence[Any], width: int) -> list[Sequence[Any]]:
    """At most `width` parts of nearly the same length, in order.

    >>> stretches([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4, 5]]
    """
    parts = min(width, len(values))
    ends = [len(values) * i // max(parts, 1) for i in range(parts + 1)]
    return [values[a:b] for a, b in itertools.pairwise(ends)]


def _of_stretch(part: Sequence[float], of_many: Callable[[Sequence[float]], float]) -> float:
    finite = [x for x in part if math.isfinite(x)]
    return of_many(finite) if finite else part[-1]


def _head(name: str, seen: Seen, now: float) -> Text:
    of = f" of {seen.total:,}" if seen.total is not None else ""
    head = Text.assemble((name, "bold"), f"   step {seen.steps[-1]:,}{of}")
    written = seen.last.get("time", math.nan)
    silent = now - written if isinstance(written, float | int) else math.nan
    patience = max(SILENT_STEPS * (seen.seconds_a_step() or 0), SILENT_SECONDS)
    if seen.finished:
        head.append("   finished", "green")
    elif silent > patience:
        head.append(f"   nothing written for {_duration(silent)}", "red")
    elif (left := seen.seconds_left()) is not None:
        head.append(f"   about {_duration(left)} to go")
    return head


def _urgent(seen: Seen) -> list[Text]:
    """A rollback that the guard asks for, and that it does not act."""
    newest = seen.columns.get("rollback_asked", [0.0])[-1]
    reason = Reason(int(newest)) if newest in list(Reason) else Reason.NONE
    lines = [Text("The guard only observes.", "dim")] if _watches(seen) else []
    if reason in sentences.ASKS:
        lines.append(Text(f"It asks to go back: {sentences.ASKS[reason]}.", "red"))
    return lines


def _numbers(seen: Seen, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL)
    table.add_column(width=NUMBER, justify="right")
    table.add_column()
    room = max(width - LABEL - NUMBER - 3, 8)
    if any(seen.regimes):
        table.add_row("regime", seen.regimes[-1], _strip(seen.regimes, room))
    for shown in SHOWN:
        values = next((seen.columns[name] for name in shown.names if name in seen.columns), None)
        if values is None or all(math.isnan(x) for x in values):
            continue
        if shown.is_told and not any(values):
            continue
        newest = next((x for x in reversed(values) if not math.isnan(x)), math.nan)
        table.add_row(shown.label, f"{newest:.4g}", sparkline(values, room, shown.of_many))
    return table


def _strip(regimes: Sequence[str], width: int) -> Text:
    """The most severe regime of each stretch."""
    severe = ("", "nominal", "recovering", "stressed", "unstable")
    strip = Text()
    for part in stretches(regimes, width):
        worst = max(part, key=lambda regime: severe.index(regime) if regime in severe else 0)
        strip.append(*REGIMES.get(worst, (" ", "")))
    return strip


def _watches(seen: Seen) -> bool:
    """Whether the guard observes now, and does not act."""
    return seen.columns.get("mode", [0.0])[-1] == Mode.OBSERVE


def _told(line: dict[str, Any], acts: bool) -> Text:
    """An intervention or an order, in a line; as it stands if it is of another version."""
    try:
        is_order = line.get("action") == "order"
        told = told_order(line) if is_order else sentences.logged(line, acts=acts)[1]
    except (KeyError, TypeError, ValueError):
        told = json.dumps(line)
    return Text(told, overflow="ellipsis", no_wrap=True)


def told_order(line: dict[str, Any]) -> str:
    """Who asked for what."""
    to = f" at {line['scale']:.3g}" if line.get("scale") else ""
    return f"Step {line.get('step')}: {line.get('order')}{to}, ordered by {line.get('who')}."


def _duration(seconds: float) -> str:
    """Without fractions, and without seconds once there are hours.

    >>> _duration(75), _duration(7265)
    ('1 min 15 s', '2 h 1 min')
    """
    hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

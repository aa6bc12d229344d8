"""What the guard's detectors would have seen in a run that had no guard: from its log alone."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax import law
from lbw_optax.law import classifier, control, statistics, telemetry
from lbw_optax.law.control import Bounds, Signal
from lbw_optax.law.divergence import Reason
from lbw_optax.report import columns as parse
from lbw_optax.report import reading
from lbw_optax.report.columns import Columns
from lbw_optax.report.levels import LEFT_OF_RISE, LEVEL, levels, rises_from
from lbw_optax.report.words import NEAR, advice, number, plural
from lbw_optax.sentences import ASKS, CAUSES

# The law goes through a log in pieces of this length, so that it is compiled once.
PIECE = 4096
# Differences between neighbouring levels of the loss that a slow rise must exceed.
MANY = 10
# A last loss of so many times the level at the end is told of.
FAR = 10


class Finding(NamedTuple):
    """What one detector saw, in one entry or in a row of them.

    Attributes:
      step: of the first entry, as the log has it.
      last_step: of the last one.
      signal: "nonfinite_loss", "nonfinite_gradients", "gradient_norm" or "loss" (a jump); of a
        loss that has risen and stays there, or of another reason to go back, "rollback".
      value: of that signal in the first entry, in its own unit; None of a rollback.
      threshold: of that signal there; None of a rollback.
      times: entries that it saw.
      reason: of a rollback, the `lbw_optax.law.divergence.Reason` by name; else "".
    """

    step: int
    last_step: int
    signal: str
    value: float | None = None
    threshold: float | None = None
    times: int = 1
    reason: str = ""


class Alarm(NamedTuple):
    """What the classifier said where it was alarmed; see :mod:`lbw_optax.law.classifier`.

    Attributes:
      step: of the first entry with an alarm.
      times: entries with one.
      risk: the highest probability that the run diverges within ten entries.
    """

    step: int
    times: int
    risk: float


class Diagnosis(NamedTuple):
    """What a log shows.

    Attributes:
      verdict: "healthy" (nothing was seen), "jumps" (single entries stood out), "risen" (the loss
        ends well above its lowest level, where it came too slowly for a guard to ask for
        anything), "recovered" (a guard would have asked to go back, but the loss came back by
        itself) or "diverged" (it did not).
      sentence: what was seen first, what came of it and what to do, in plain words.
      findings: all that was seen, in the order of the log.
      alarm: of the classifier, None if it had none; the verdict does not depend on it.
      entries: entries of the log with a loss or a gradient norm.
      complaints: sentences on what of the log is damaged and was passed over.
    """

    verdict: str
    sentence: str
    findings: tuple[Finding, ...]
    alarm: Alarm | None
    entries: int
    complaints: tuple[str, ...]


def diagnose(log: str | os.PathLike[str] | Mapping[str, Any]) -> Diagnosis:
    """Say what the guard would have seen in a run that had none, from its log.

    The law of the guard reads the loss and the gradient norm, entry by entry, as it would have in
    the run; it cannot see what is in no log, as the overshoot. What follows an intervention cannot
    be known: the run went on without one. Where a log has an entry only every so many steps, its
    numbers are means, and a jump of one step may not show.

    Args:
      log: a file of JSON Lines (an object with ``loss`` or ``grad_norm`` a line), a CSV file, a
        ``trainer_state.json`` of a Hugging Face Trainer, a TensorBoard event file where its reader
        is installed, or a directory with one of them; or a mapping with arrays of one length under
        "loss", "gradient_norm" and "step", any of which may be missing but for one of the first
        two. Other programs' usual names are known. In a mapping each entry is one that was logged:
        NaN and None are numbers that are not finite.

    Raises:
      TypeError: if it is none of these kinds.
      FileNotFoundError: if there is no such file.
      ValueError: if it is none of these, or has neither a loss nor a gradient norm.
      ImportError: for a TensorBoard log where no reader is installed.

    Example:
      >>> import numpy as np, lbw_optax
      >>> falling = 3 * 0.99 ** np.arange(60)
      >>> found = lbw_optax.diagnose({"loss": np.append(falling, np.full(40, np.nan))})
      >>> found.verdict, found.findings[0].signal, found.findings[0].step
      ('diverged', 'nonfinite_loss', 60)
    """
    if isinstance(log, Mapping):
        return of_columns(parse.of_mapping(log), "the log")
    if not isinstance(log, str | os.PathLike):
        raise TypeError(
            f"diagnose reads a file, a directory or a mapping of arrays, not {type(log).__name__}: "
            'pass the losses as {"loss": losses}.'
        )
    run = reading.read(Path(log))
    return of_columns(run.columns, str(log), tuple(run.complaints))


def of_columns(columns: Columns, name: str, complaints: tuple[str, ...] = ()) -> Diagnosis:
    """The same, of columns that were read before.

    Raises:
      ValueError: if there is neither a loss nor a gradient norm.
    """
    given = [x for x in ("loss", "gradient_norm") if x in columns]
    if not given:
        if not columns:
            raise ValueError(f"{name} has no entry with a number yet: has the run made a step?")
        others = ", ".join(list(columns)[:12])
        raise ValueError(
            f"{name} has neither a loss nor a gradient norm among its columns ({others}): call "
            "one of them loss or grad_norm."
        )
    entries = np.any([~np.isnan(columns[x]) for x in given], axis=0)
    step = reading.steps(columns)[entries]
    loss, norm = (columns.get(x, np.full(len(entries), np.nan))[entries] for x in _READ)
    seen = _watch(loss, norm)
    findings, alarm = _findings(step, seen), _alarm(step, seen.risk)
    verdict = _verdict(findings, step, loss)
    sentence = _sentence(verdict, findings, step, loss)
    if alarm is not None:
        sentence = f"{sentence} {_warned(alarm)}"
    return Diagnosis(verdict, sentence, findings, alarm, len(step), complaints)


_READ = ("loss", "gradient_norm")


class _Entry(NamedTuple):
    """One entry as the law reads it; infinite where a number is not finite, NaN where none is."""

    loss: Any
    norm: Any


def _findings(step: np.ndarray, seen: "_Seen") -> tuple[Finding, ...]:
    """In the order of the log; entries of one kind that are near each other become one finding."""
    found: list[Finding] = []
    newest, row, asked_before = -NEAR, -1, 0
    for i in np.flatnonzero((seen.signal > 0) | (np.diff(seen.asked, prepend=0) != 0)).tolist():
        here, signal, asked = int(step[i]), int(seen.signal[i]), int(seen.asked[i])
        if signal:
            name = Signal(signal).name.lower()
            if i - newest < NEAR and found[row].signal == name:
                found[row] = found[row]._replace(last_step=here, times=found[row].times + 1)
            else:
                row = len(found)
                value, threshold = float(seen.value[i]), float(seen.threshold[i])
                found.append(Finding(here, here, name, value, threshold))
            newest = i
        if asked not in (0, asked_before):
            found.append(Finding(here, here, "rollback", reason=Reason(asked).name.lower()))
        asked_before = asked
    return tuple(found)


def _alarm(step: np.ndarray, risk: np.ndarray) -> Alarm | None:
    above = np.flatnonzero(risk > classifier.shipped().alarm)
    if not len(above):
        return None
    return Alarm(int(step[above[0]]), len(above), float(risk[above].max()))


def _warned(alarm: Alarm) -> str:
    return (
        f"The classifier's alarm stands in {plural(alarm.times, 'entry')}, first at step "
        f"{alarm.step:,}: a divergence within ten entries, with a probability of up to "
        f"{100 * alarm.risk:.0f} %."
    )


class _Seen(NamedTuple):
    """What the law says of each entry, arrays."""

    signal: Any  # int32, a `Signal`: why it stands out, or NONE
    value: Any
    threshold: Any
    asked: Any  # int32, a `Reason`
    risk: Any  # float32, the probability that the run diverges within ten entries


def _watch(loss: np.ndarray, norm: np.ndarray) -> _Seen:
    """The law over the whole log. Without a gradient norm it is given one that never changes."""
    loss, norm = _as_float32(loss), _as_float32(_from_the_start(norm))
    held, pieces = law.init(_BOUNDS), []
    for start in range(0, len(loss), PIECE):
        piece = _Entry(*(x[start : start + PIECE] for x in (loss, norm)))
        short = PIECE - len(piece.loss)
        whole = _Entry(*(np.pad(x, (0, short), constant_values=np.nan) for x in piece))
        held, seen = _go_through(held, whole)
        pieces.append([np.asarray(x)[: PIECE - short] for x in seen])
    if not pieces:
        return _Seen(*(np.zeros(0) for _ in _Seen._fields))
    return _Seen(*(np.concatenate(x) for x in zip(*pieces, strict=True)))


def _from_the_start(norm: np.ndarray) -> np.ndarray:
    """Entries before the first norm, as where one is logged every tenth step, have that one."""
    measured = np.isfinite(norm) & (norm > 0)
    first = norm[measured][0] if measured.any() else 1.0
    missing = np.isnan(norm) & (np.cumsum(measured) == 0)
    return np.where(missing, first, norm)


def _as_float32(x: np.ndarray) -> np.ndarray:
    """A number that single precision does not hold is finite all the same: it is the largest."""
    most = np.finfo(np.float32).max
    return np.where(np.isfinite(x), np.clip(x, -most, most), x).astype(np.float32)


# The scale is 1 in all of it: nothing intervenes.
_BOUNDS = Bounds(min_scale=1.0)


@jax.jit
def _go_through(held: law.Law, entries: _Entry) -> tuple[law.Law, _Seen]:
    blank = telemetry.init()

    def one(held: law.Law, entry: _Entry) -> tuple[law.Law, _Seen]:
        has_loss, has_norm = jnp.isfinite(entry.loss), jnp.isfinite(entry.norm)
        broken_norm = jnp.isinf(entry.norm)
        seen = blank._replace(
            loss=jnp.where(has_loss, entry.loss, 0.0),
            has_loss=has_loss,
            nonfinite_loss=jnp.isinf(entry.loss).astype(jnp.int32),
            # An entry without a norm, after others with one, is as the mean of them.
            gradient_norm=jnp.where(has_norm, entry.norm, jnp.exp(held.statistics.gradient.mean)),
            has_gradient=~broken_norm,
            nonfinite_gradients=broken_norm.astype(jnp.int32),
        )
        arrival, known = control.arrive(seen, held.statistics), held.statistics
        signal = control.first_of(
            (arrival.rejected > 0, arrival.rejected),
            (arrival.jumps, Signal.GRADIENT_NORM),
            (arrival.spikes, Signal.LOSS),
            otherwise=Signal.NONE,
        )
        by_norm, by_loss = signal == Signal.GRADIENT_NORM, signal == Signal.LOSS
        of_loss = statistics.loss_threshold(known) * known.loss_unit
        of_norm = jnp.exp(statistics.gradient_threshold(known))
        after, _ = law.step(held, seen, _BOUNDS)
        return after, _Seen(
            signal=signal,
            value=jnp.where(by_loss, entry.loss, jnp.where(by_norm, entry.norm, 1.0)),
            threshold=jnp.where(by_loss, of_loss, jnp.where(by_norm, of_norm, 0.0)),
            asked=after.divergence.rollback_asked,
            risk=after.classifier.risk.soon,
        )

    return jax.lax.scan(one, held, entries)


def _verdict(findings: tuple[Finding, ...], step: np.ndarray, loss: np.ndarray) -> str:
    asked = _asked(findings)
    given = loss[~np.isnan(loss)]
    if len(given) and not np.isfinite(given[-LEVEL:]).any():
        return "diverged"
    if asked is not None:
        return "recovered" if _has_come_back(asked, step, loss) else "diverged"
    if _has_risen(loss):
        return "risen"
    return "jumps" if findings else "healthy"


def _has_risen(loss: np.ndarray) -> bool:
    """Whether the loss ends far above its lowest level.

    That is by more than its levels differ from one to the next, many times over, and by more than a
    tenth of all that it had fallen.
    """
    found = levels(loss)
    if len(found) < 5:
        return False
    rise, noise = np.median(found[-3:]) - found.min(), np.median(np.abs(np.diff(found)))
    return bool(rise > max(MANY * noise, LEFT_OF_RISE * (found[0] - found.min())))


def _has_come_back(asked: Finding, step: np.ndarray, loss: np.ndarray) -> bool:
    """Whether the loss ends near the lowest level that it had before the guard would have asked.

    A tenth of how far it has been above that is near, if no more than it had been at before.
    """
    before = levels(loss[step < asked.step])
    after = loss[(step >= asked.step) & np.isfinite(loss)]
    if not (len(before) and len(after)):
        return False
    lowest, end = before.min(), np.median(after[-LEVEL:])
    is_near = end - lowest <= LEFT_OF_RISE * max(after.max() - lowest, 0.0)
    return bool(is_near and (end <= before.max() or len(before) == 1))


def _sentence(
    verdict: str, findings: tuple[Finding, ...], step: np.ndarray, loss: np.ndarray
) -> str:
    if not len(step):
        return "The log has no entry with a loss or a gradient norm."
    seen = f"in {plural(len(step), 'entry')}, steps {step.min():,.0f} to {step.max():,.0f}"
    if verdict == "healthy":
        nothing = (
            f"Nothing stands out {seen}: by loss and gradient norm alone the guard would have done "
            f"nothing. A rate that is too high may show in neither. {_end(loss)}"
        )
        return nothing.strip()
    asked = _asked(findings)
    said = _risen(findings, step, loss) if verdict == "risen" else []
    if not said:
        first = findings[0] if asked is None else _led_to(asked, findings)
        said = _troubles(first, asked, findings, step, loss)
        began = first.step if asked is not first else rises_from(asked.step, step, loss)
        what_to_do = _of_jumps(findings, int(step[-1])) or advice(
            _cause(first), began, lost=verdict == "diverged"
        )
    else:
        began = rises_from(int(step[-1]), step, loss)
        what_to_do = advice("loss", began, lost=True)
    stood_out = sum(x.times for x in findings if x.signal != "rollback")
    came_of_it = {
        "jumps": f"In all, {stood_out:,} of {plural(len(step), 'entry')} stood out; the run "
        "went on.",
        "recovered": "The loss came back by itself.",
        "diverged": "It has not come back.",
        "risen": "",
    }
    return " ".join(x for x in (*said, came_of_it[verdict], _end(loss), what_to_do) if x)


def _of_jumps(findings: tuple[Finding, ...], last: int) -> str:
    """What to do about finite jumps of one entry each, and of nothing else: "" of others.

    Of the last step nobody knows yet whether it is gone.
    """
    finite = all(x.signal in ("loss", "gradient_norm") for x in findings)
    if not finite or any(x.times > 1 or x.step >= last for x in findings):
        return ""
    at = ", ".join(f"{x.step:,}" for x in findings[:4])
    more = f" and {len(findings) - 4:,} more" if len(findings) > 4 else ""
    which = "step" if len(findings) == 1 else "steps"
    return (
        f"What to do: nothing, what was gone at the next entry did no harm; where it comes more "
        f"often, look at the batches of {which} {at}{more}."
    )


def _risen(findings: tuple[Finding, ...], step: np.ndarray, loss: np.ndarray) -> list[str]:
    singly = sum(x.times for x in findings)
    before = f" {plural(singly, 'entry')} stood out, singly." if singly else ""
    began = rises_from(int(step[-1]), step, loss)
    return [
        f"The loss rises from about step {began:,} on, too slowly for a guard to ask to go "
        f"back.{before}"
    ]


def _troubles(
    first: Finding,
    asked: Finding | None,
    findings: tuple[Finding, ...],
    step: np.ndarray,
    loss: np.ndarray,
) -> list[str]:
    earlier = sum(x.times for x in findings[: findings.index(first)])
    said = [_first(first, earlier, step, loss)]
    if asked is not None and asked is not first:
        said.append(f"At step {asked.step:,} the guard would have asked to go back: {_ask(asked)}.")
    return said


def _asked(findings: tuple[Finding, ...]) -> Finding | None:
    return next((x for x in findings if x.signal == "rollback"), None)


def _led_to(asked: Finding, findings: tuple[Finding, ...]) -> Finding:
    """Where the trouble began that ended in this: the first of a chain with short gaps."""
    first = asked
    for found in reversed(findings[: findings.index(asked)]):
        if first.step - found.last_step >= NEAR:
            break
        first = found
    return first


def _first(found: Finding, earlier: int, step: np.ndarray, loss: np.ndarray) -> str:
    before = f" ({plural(earlier, 'entry')} had stood out before, singly)" if earlier else ""
    if found.signal == "rollback":
        since = f" It rises from about step {rises_from(found.step, step, loss):,} on."
        return (
            f"At step {found.step:,} the guard would have asked to go back: {_ask(found)}{before}."
            f"{since if found.reason == 'loss' else ''}"
        )
    numbers = ""
    if found.signal in ("loss", "gradient_norm") and found.value is not None:
        numbers = f" ({number(found.value)}; the threshold was {number(found.threshold or 0.0)})"
    row = f", {found.times:,} times to step {found.last_step:,}" if found.times > 1 else ""
    what = "The trouble begins" if earlier else "The first trouble is"
    return f"{what} at step {found.step:,}: {CAUSES[found.signal]}{numbers}{row}{before}."


def _ask(found: Finding) -> str:
    return ASKS[Reason[found.reason.upper()]]


def _cause(found: Finding) -> str:
    return found.reason if found.signal == "rollback" else found.signal


def _end(loss: np.ndarray) -> str:
    found = levels(loss)
    if not len(found):
        return ""
    given = loss[~np.isnan(loss)]
    if not np.isfinite(given[-LEVEL:]).any():
        return f"The loss ends not finite; its lowest level was {number(found.min())}."
    finite = given[np.isfinite(given)]
    end, last = np.median(finite[-LEVEL:]), finite[-1]
    more = f", the last one is {number(last)}" if last > FAR * abs(end) else ""
    lowest = number(min(found.min(), end))
    return f"The loss ends at {number(end)}{more}; its lowest level was {lowest}."

"""One paragraph on a guarded run: first cause, first step, what was done, how it ended, what to do.

For whoever opens the report first thing in the morning. What a cause is called is in
`lbw_optax.sentences`.
"""

import math
from collections import Counter
from typing import Any

import numpy as np

from lbw_optax.law import classifier
from lbw_optax.law.control import LOW
from lbw_optax.law.divergence import SKIP_STEPS, Reason
from lbw_optax.report.levels import LEFT_OF_RISE, last_low, levels, lowest_at, rises_from
from lbw_optax.report.reading import Freeze, Run, freezes, kept, steps, watches
from lbw_optax.sentences import ASKS, OWN_CAUSES, cause, too_high
from lbw_optax.state import Mode

# Of a cause, what to look at. {step} is the first, {where} names the first few.
_LOOK = {
    "nonfinite_gradients": "look at the batches of {where}, and at the number format: float16 "
    "overflows, bfloat16 does not",
    "nonfinite_loss": "look at the batches of {where}, and at the loss function: an empty batch, a "
    "logarithm of 0 or a division by 0 makes such a loss",
    "nonfinite_updates": "restore parameters and optimizer state from before step {step:,}: one of "
    "them is corrupt",
    "gradient_norm": "look at the batches of {where}; if they are in order, clip the gradients",
    "loss": "look at the batches of {where} and just before; if they are in order, lower the "
    "learning rate",
    "overshoot": "lower the learning rate",
    "relative_step": "lower the learning rate",
    "parameters": "restore a state from before step {step:,}, and look for broken memory",
    "inner_state": "restore a state from before step {step:,}: a moment of the optimizer is "
    "corrupt",
    "skips": "look at the batches from step {step:,} on",
    "request": "",
}
# Troubles with no more steps than this between them have to do with each other: as many as a
# rollback goes back.
NEAR = 50
# A scale above this reads as 100 %.
FULL_SHARE = 0.995
# What a guard does to a run, apart from reports and from growing again.
_DONE = {
    "skip": "skipped {steps}",
    "clip": "scaled a gradient back {times}",
    "cut": "cut the updates {times}",
}
# What told of a jump that the loss has not come back from, and the loss before it and at the end.
_Risen = tuple[dict[str, Any], float, float]
# Where the loss was lowest, and the learning rate there and at the end.
_Rose = tuple[int, float, float]


def paragraph(run: Run) -> str:
    """What happened in a guarded run, in plain words."""
    troubles = [line for line in run.audit if line["action"] in (*_DONE, "rollback")]
    sentences = [_extent(run), _watched(run)]
    asks, risen, rose = _asks(run), _risen(run, troubles), _rate_rose(run)
    what_to_do = _advice(run, troubles, asks, risen, rose)
    last = _ends_with(run, troubles, risen)
    froze = freezes(run)
    is_urgent = asks is not None or (last is not None and last is not troubles[0])
    what_to_do += _batches(run) if "batch" in what_to_do else ""
    ends_low = (_last_scale(run) or 1.0) < LOW  # which a later sentence tells
    if is_urgent:
        # What the reader must know stands first; what came before it and was got over, later.
        sentences += [what_to_do, _done(run)]
    elif troubles:
        calm = {line["action"] for line in troubles} <= {"cut"}
        what = "intervention" if calm else "trouble"
        if froze and froze[0].start < troubles[0]["step"]:
            what = f"other {what}"
            sentences.append(_frozen(froze))
        sentences += [_first(troubles[0], what), _done(run)]
    elif froze:
        sentences.append(_frozen(froze))
    elif any(line["action"] not in ("order", "alarm") for line in run.audit):
        sentences.append("" if ends_low else "The guard did nothing but let the updates grow.")
    else:
        sentences.append("The guard had nothing to do." if run.guarded and not ends_low else "")
    if froze and _frozen(froze) not in sentences:
        sentences.append(_frozen(froze))
    # A jump of the data's is no matter of the rate, whatever the scale came to after it.
    scale = "" if risen is not None and asks is None else _scale(run)
    sentences += [_alarms(run), _ordered(run), scale, _end(run)]
    sentences.append("" if _rate(rose) in what_to_do else _rate(rose))
    sentences.append("" if is_urgent else what_to_do)
    return " ".join(x for x in sentences if x)


def advice(cause: str, step: int, *, lost: bool, where: str = "") -> str:
    """What to do about a cause, as a sentence; "" for nothing.

    Args:
      cause: a signal, or the reason of a rollback.
      step: that it was first seen at.
      lost: whether the run is to be taken back to before that.
      where: the steps, in words; else that one.
    """
    look = _LOOK.get(cause, "look at the batches of {where}")
    look = look.format(step=step, where=where or f"step {step:,}")
    if lost and "restore" not in look:
        back = f"restore a checkpoint from before step {step:,}" if step > 0 else "begin anew"
        look = f"{back}, and {look}" if look else back
    return f"What to do: {look}." if look else ""


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "step"), plural(12345, "entry")
    ('1 step', '12,345 entries')
    """
    many = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {noun if count == 1 else many}"


def number(x: float) -> str:
    """Three digits.

    >>> number(3.14159), number(0.0), number(2e7), number(659.76)
    ('3.14', '0', '2e+07', '660')
    """
    return f"{x:.3g}"


def multiplicity(line: dict[str, Any]) -> int:
    """Interventions in one line of an audit log: a row of skips is one line."""
    count = line.get("count", 1)
    return count if type(count) is int and count > 0 else 1


def counts(audit: list[dict[str, Any]]) -> Counter[str]:
    """How many there were of each action."""
    total: Counter[str] = Counter()
    for line in audit:
        total[line["action"]] += multiplicity(line)
    return total


def skips_that_stayed(audit: list[dict[str, Any]]) -> int:
    """Skipped steps less those that a rollback undid: these count as steps made again.

    >>> skip = {"action": "skip", "step": 8, "last_step": 9, "count": 2}
    >>> back = {"action": "rollback", "step": 7, "from_step": 10, "to_step": 7}
    >>> skips_that_stayed([skip]), skips_that_stayed([skip, back])
    (2, 0)
    """
    skipped: list[int] = []
    for line in audit:
        if line["action"] == "skip" and "step" in line:
            skipped += range(line["step"], line["step"] + multiplicity(line))
        elif line["action"] == "rollback" and _distance(line):
            while skipped and skipped[-1] >= line["to_step"]:
                skipped.pop()
    return len(skipped)


def run_again(run: Run) -> tuple[int, float]:
    """Updates that were made and then undone, or made again after a resume; and their seconds.

    The seconds are NaN where the log has no times.
    """
    step = steps(run.columns)
    undone = ~kept(step)
    times = run.columns.get("time")
    if times is None or len(times) < 2:
        return int(undone.sum()), math.nan
    # The time between two lines, without the pauses of a run that was stopped in between.
    passed = np.diff(times)
    passed = passed[np.isfinite(passed) & (passed > 0)]
    usual = float(np.median(passed)) if len(passed) else math.nan
    return int(undone.sum()), undone.sum() * usual


def _extent(run: Run) -> str:
    step = steps(run.columns)
    if not len(step):
        return "There are interventions only, no metrics."
    end = {
        True: "came to its end",
        False: "has not come to its end: it was stopped, or is still going on",
        None: "",
    }[run.finished]
    made = f"The run is logged from step {step.min():,.0f} to {step.max():,.0f}"
    return f"{made} and {end}." if end else f"{made}."


def _watched(run: Run) -> str:
    if not watches(run):
        return ""
    acted = np.flatnonzero(run.columns["mode"] == Mode.GOVERN)
    if not len(acted):
        return "The guard only watched: no update was changed, and all of this it would have done."
    since = steps(run.columns)[acted[-1] + 1]
    return f"From step {since:,.0f} on the guard only watched, and changed no update."


def _first(line: dict[str, Any], what: str) -> str:
    numbers = ""
    if line.get("signal") in ("loss", "gradient_norm", "relative_step"):
        seen = [x for x in (line.get("value"), line.get("threshold")) if isinstance(x, float | int)]
        if len(seen) == 2:
            numbers = f" ({number(seen[0])}; the threshold was {number(seen[1])})"
    return f"The first {what} was at step {line['step']:,}: {_why(line)}{numbers}."


def _why(line: dict[str, Any]) -> str:
    """The cause of an intervention in words; one that is not known, by its name."""
    return cause(line["action"], str(line.get("signal", "")))


def _frozen(froze: list[Freeze]) -> str:
    """Which layers stayed as they were, since when and why."""
    first, names = froze[0], list(dict.fromkeys(one.group for one in froze))
    why = OWN_CAUSES.get(first.signal, first.signal)
    if len(froze) == 1:
        end = f"trained again from step {first.end:,} on" if first.end else "does so to the end"
        return (
            f"From step {first.start:,} on {first.group} stayed as it was while the rest trained "
            f"(frozen), because {why}; it {end}."
        )
    others = f", {plural(len(names), 'layer')} in all" if len(names) > 1 else ""
    still = [name for name in names if any(x.group == name and x.end is None for x in froze)]
    end = f" At the end {', '.join(still[:3])} {'is' if len(still) == 1 else 'are'} frozen still."
    return (
        f"Single layers stayed as they were while the rest trained (frozen), "
        f"{_times(len(froze))}{others}. The first was {first.group} at step {first.start:,}, "
        f"because {why}.{end if still else ''}"
    )


def _of_layer(run: Run) -> str:
    """What to do about the first layer that froze; "" if none did."""
    froze = freezes(run)
    if not froze:
        return ""
    first = froze[0]
    return f"What to do: look at {first.group} and at the batch of step {first.start:,}."


def _done(run: Run) -> str:
    audit = run.audit
    total = counts(audit)
    done = [
        said.format(steps=plural(total[x], "step"), times=_times(total[x]))
        for x, said in _DONE.items()
        if total[x]
    ]
    back = [line for line in audit if line["action"] == "rollback"]
    if back:
        undone = sum(_distance(line) for line in back)
        reason = _why(back[0])
        first = "the first time because" if len(back) > 1 else "because"
        done.append(
            f"went back {_times(len(back))}, over {plural(undone, 'step')}, {first} {reason}"
        )
    if not done:
        return ""
    listed = done[0] if len(done) == 1 else ", ".join(done[:-1]) + " and " + done[-1]
    return f"The guard {'would have ' if watches(run) else ''}{listed}."


def _distance(line: dict[str, Any]) -> int:
    left, back = line.get("from_step"), line.get("to_step")
    return max(left - back, 0) if isinstance(left, int) and isinstance(back, int) else 0


def _batches(run: Run) -> str:
    """How a step is read after rollbacks, which go on with later batches; "" without any."""
    later = sum(_distance(line) for line in run.audit if line["action"] == "rollback")
    if not later:
        return ""
    return (
        f" A step after the last rollback had the batch {later} further on, if the loop takes its "
        "batches by `data_step`."
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _alarms(run: Run) -> str:
    """What the classifier has warned of, which moves nothing by itself.

    The audit log has no line of an alarm that begins in the step of another intervention; the
    metrics have its probability.
    """
    alarms = [line for line in run.audit if line["action"] == "alarm" and "step" in line]
    step = steps(run.columns)
    risk = run.columns.get("risk_10", np.full(len(step), np.nan))
    given = risk <= 1
    # A line of the metrics counts the updates made: that of step 30 is at 31.
    high = step[given & (risk > float(classifier.shipped().alarm))] - 1
    begins = [line["step"] for line in alarms[:1]] + high[:1].tolist()
    if not begins:
        return ""
    known = [x for line in alarms if isinstance(x := line.get("value"), float | int)]
    known += risk[given].tolist()
    up_to = f", with a probability of up to {100 * max(known):.0f} %" if known else ""
    often = f"{_times(len(alarms))}, first" if len(alarms) > 1 else "once"
    if not alarms or alarms[0]["step"] > min(begins):  # not all of them have a line
        often = "first"
    return (
        f"The classifier's alarm was raised {often} at step {min(begins):,.0f}: a divergence "
        f"within ten steps{up_to}."
    )


def _ordered(run: Run) -> str:
    """What people have ordered."""
    orders = [line for line in run.audit if line["action"] == "order"]
    if not orders:
        return ""
    last = orders[-1]
    of_them = "A person gave an order" if len(orders) == 1 else f"{len(orders)} orders were given"
    which = "" if len(orders) == 1 else ", the last"
    return f'{of_them}{which} at step {last["step"]:,}: "{last.get("order")}", {last.get("who")}.'


def _is_held_by_order(run: Run) -> bool:
    """Whether a person has pinned the scale and not given it back."""
    pins = [line.get("order") for line in run.audit if line["action"] == "order"]
    pins = [order for order in pins if order in ("hold", "release")]
    return pins[-1:] == ["hold"]


def _scale(run: Run) -> str:
    """Where the updates came to, if that is well below what the user asked for."""
    last = _last_scale(run)
    if last is None:
        return ""
    low = last < LOW and not _is_held_by_order(run)
    if watches(run):  # nothing answers its scale, which falls on with every step
        would = f"the guard would hold the updates down: {too_high(last, acts=False)}"
        return f"At the end {would}." if low else ""
    if low:
        return (
            f"At the end the updates are held at {number(100 * last)} %: the learning rate looks "
            f"{number(1 / last)} times too high."
        )
    if last >= FULL_SHARE:
        return "At the end the optimizer's updates are applied in full."
    return f"At the end the guard scales the updates to {number(100 * last)} %."


def _last_scale(run: Run) -> float | None:
    scale = run.columns.get("scale", np.zeros(0))
    scale = scale[np.isfinite(scale) & (scale > 0)]
    if len(scale):
        return float(scale[-1])
    told = [x for line in run.audit if isinstance(x := line.get("scale_after"), float) and x > 0]
    return told[-1] if told else None


def _end(run: Run) -> str:
    loss = run.columns.get("loss", np.zeros(0))
    loss = loss[kept(steps(run.columns))] if len(loss) else loss
    given = loss[~np.isnan(loss)]
    if not len(given):
        return ""
    finite = given[np.isfinite(given)]
    if not len(finite):
        return "The loss was never finite."
    lowest = f"its lowest was {number(finite.min())}"
    if not np.isfinite(given[-10:]).any():
        return f"The loss ends not finite; {lowest}."
    return (
        f"The loss went from {number(finite[0])} to {number(float(np.median(finite[-10:])))}; "
        f"{lowest}."
    )


def _ends_with(
    run: Run, troubles: list[dict[str, Any]], risen: _Risen | None
) -> dict[str, Any] | None:
    """The trouble that the run has not got over, if there is one."""
    if not troubles:
        return None
    return _began(troubles) if _is_lost(run) else None if risen is None else risen[0]


def _risen(run: Run, troubles: list[dict[str, Any]]) -> _Risen | None:
    """A jump that the loss has not come back from: what told of it, the loss before and at the end.

    So much is left that it is more than a quarter of all that the loss had fallen, and that no loss
    of the last ones is as low as the middle one before.
    """
    jumps = [x for x in troubles if x["action"] in ("skip", "clip") and x.get("signal") in _JUMPS]
    loss, step = (run.columns.get(x, np.zeros(0)) for x in ("loss", "step"))
    if not jumps or len(loss) != len(step):
        return None
    line = _began(jumps)
    good = np.isfinite(loss) & kept(step)
    before, after = loss[good & (step <= line["step"])], loss[good & (step > line["step"])]
    if len(before) < 10 or len(after) < 20:
        return None
    was, ends = float(np.median(before[-10:])), after[len(after) // 2 :][-NEAR:]
    stays = ends.min() > was and np.median(ends) - was > 0.25 * (before[0] - was)
    return (line, was, float(np.median(ends[-10:]))) if stays else None


_JUMPS = ("loss", "gradient_norm")


def _asks(run: Run) -> tuple[int, Reason] | None:
    """Since when the guard has asked for a rollback that nobody has made, and why."""
    asked = np.nan_to_num(run.columns.get("rollback_asked", np.zeros(0)))
    if _gave_up(run) or not len(asked) or not 0 < asked[-1] < len(Reason):
        return None
    since = int(np.flatnonzero(asked == 0)[-1]) + 1 if (asked == 0).any() else 0
    return int(steps(run.columns)[since]), Reason(int(asked[-1]))


def _length(run: Run, at: int) -> str:
    """How the parameters' length changed up to that step, if it is logged and jumped."""
    norm, step = run.columns.get("parameter_norm", np.zeros(0)), steps(run.columns)
    if len(norm) != len(step):
        return ""
    here, before = norm[step == at], norm[np.isfinite(norm) & (step < at)]
    if not (len(here) and len(before)):
        return ""
    if not np.isfinite(here[-1]):
        return " (their length is not finite)"
    jumped = not 1 / MUCH < here[-1] / max(before[-1], 1e-30) < MUCH
    return f" (their length went from {number(before[-1])} to {number(here[-1])})" if jumped else ""


def _led_to(run: Run, troubles: list[dict[str, Any]], asked: int, reason: Reason) -> int:
    """The step at which that began for which the guard asked: it waits until it is sure."""
    if reason == Reason.SKIPS:
        rows = [x["step"] for x in troubles if x["action"] == "skip" and x["step"] < asked]
        return rows[-1] if rows else asked
    return last_low(asked, *_losses(run)) if reason == Reason.LOSS else asked


def _losses(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of the updates that stayed; none where no loss was logged."""
    step = steps(run.columns)
    loss = run.columns.get("loss", np.full(len(step), np.nan))
    counts = kept(step)
    return step[counts], loss[counts]


def _went_on(run: Run, asked: int) -> str:
    """What became of a loss that after this step was lower than ever before it; "" of another."""
    step, loss = _losses(run)
    before, after = levels(loss[step < asked]), levels(loss[step >= asked])
    if len(after) < 3 or (len(before) and after.min() >= before.min()):
        return ""
    if after[-1] - after.min() <= LEFT_OF_RISE * (after.max() - after.min()):
        return "The loss came down after that, and stayed there: there is nothing to do."
    began = rises_from(int(step[-1]), step, loss)
    what = f"The loss came down after that, and rises again from about step {began:,} on."
    return f"{what} {advice('loss', began, lost=True)}"


def _rate_rose(run: Run) -> _Rose | None:
    """Where the loss was lowest, and the learning rate there and at the end.

    None unless the rate has more than doubled since, and the loss has not come back.
    """
    rate, loss = (run.columns.get(x, np.zeros(0)) for x in ("learning_rate", "loss"))
    step = steps(run.columns)
    if not len(step) == len(rate) == len(loss):
        return None
    good = kept(step) & np.isfinite(rate) & (rate > 0)
    step, rate, loss = step[good], rate[good], loss[good]
    found, at = levels(loss), lowest_at(loss)
    if at is None or rate[-1] <= MUCH * rate[at]:
        return None
    is_back = found[-1] - found.min() <= LEFT_OF_RISE * (found[0] - found.min())
    is_back = is_back and bool(np.isfinite(loss[-10:]).any())
    return None if is_back else (int(step[at]), float(rate[at]), float(rate[-1]))


def _rate(rose: _Rose | None) -> str:
    if rose is None:
        return ""
    step, low, end = rose
    return (
        f"The learning rate has risen from {number(low)}, where the loss was lowest at about step "
        f"{step:,}, to {number(end)}, {number(end / low)} times as much."
    )


def _to_before(rose: _Rose) -> str:
    return f"to about what it was at step {rose[0]:,}, {number(rose[1])}"


# A learning rate that has risen by more than this since the loss was lowest is told of, and so is a
# length of the parameters that has changed by more in one step.
MUCH = 2.0


def _is_lost(run: Run) -> bool:
    """Whether the guard gave up, or the last losses are not finite."""
    loss = run.columns.get("loss", np.zeros(0))
    given = loss[~np.isnan(loss)][-10:]
    return _gave_up(run) or bool(len(given) and not np.isfinite(given).any())


def _gave_up(run: Run) -> bool:
    return bool((run.columns.get("exhausted", np.zeros(0))[-1:] == 1).any())


def _advice(
    run: Run,
    troubles: list[dict[str, Any]],
    asked: tuple[int, Reason] | None,
    risen: _Risen | None,
    rose: _Rose | None,
) -> str:
    last = _last_scale(run)
    if asked is not None:
        step, reason = asked
        why = ASKS[reason] + (_length(run, step) if reason == Reason.PARAMETERS else "")
        what = f"From step {step:,} on the guard asked to go back, and nobody did: {why}."
        if reason == Reason.LOSS and (later := _went_on(run, step)):
            return f"At step {step:,} the guard asked to go back, and nobody did. {later}"
        began = _led_to(run, troubles, step, reason)
        since = f" That begins at about step {began:,}." if began < step else ""
        if reason == Reason.PARAMETERS and watches(run) and "not finite" not in why:
            # Earlier versions expected steps as long as they would have let them be.
            return (
                f"{what} What to do: lower the learning rate, for the steps were taken in full and "
                f"look too long. If that is not it, restore a state from before step {began:,}."
            )
        if rose is not None and reason == Reason.LOSS:
            back = f"What to do: restore a checkpoint from before step {began:,}, and lower"
            return f"{what}{since} {_rate(rose)} {back} the learning rate {_to_before(rose)}."
        return f"{what}{since} {advice(reason.name.lower(), began, lost=True)}"
    if _is_lost(run):
        gave_up = "The guard has used up what it may do" if _gave_up(run) else "The run is lost"
        if not troubles:
            return f"{gave_up}. {advice('', int(steps(run.columns)[-1]), lost=True)}"
        line = _began(troubles)
        what = f"{gave_up}; what ended it began at step {line['step']:,}: {_why(line)}."
        return f"{what} {advice(str(line.get('signal', '')), line['step'], lost=True)}"
    if risen is not None:
        line, before, after = risen
        on = f"all steps from {line['step']:,} on"
        return (
            f"At step {line['step']:,} {_why(line)}, and the loss has stayed up: it was "
            f"{number(before)} before and ends at {number(after)}. "
            f"{advice(str(line.get('signal', '')), line['step'], lost=True, where=on)}"
        )
    rate = ""
    if last is not None and last < LOW and not _is_held_by_order(run):
        how = f"to about {last:.2g} times what it is"
        if rose is not None:  # the guard comes after a rate that goes on rising
            how = _to_before(rose)
        elif watches(run):
            how = "or let the guard govern, which finds by how much"
        rate = f"What to do: lower the learning rate{', ' if how[:2] == 'or' else ' '}{how}."
    weight = Counter[str]()
    for line in troubles:
        if line["action"] in ("skip", "clip"):
            weight[str(line.get("signal", ""))] += multiplicity(line)
    if not weight:
        return rate or _of_layer(run) or ("There is nothing to do." if run.guarded else "")
    signal = weight.most_common(1)[0][0]
    of_signal = [line for line in troubles if str(line.get("signal", "")) == signal]
    rest = advice(signal, of_signal[0]["step"], lost=False, where=_where(of_signal))
    return f"{rate} {rest.replace('What to do: look', 'Also look')}" if rate else rest


def _began(troubles: list[dict[str, Any]]) -> dict[str, Any]:
    """The trouble that the end began with.

    A last row of skips that is long enough to end a run, or the first such row where rollbacks have
    not ended it; or else the first of the troubles that follow one another up to the last, with
    short gaps.
    """
    first = troubles[-1]
    if _is_long_row(first):
        after_rollback = False
        for line in reversed(troubles[:-1]):
            if line["action"] == "rollback":
                after_rollback = True
                continue
            same = _is_long_row(line) and line.get("signal") == first.get("signal")
            if not (after_rollback and same):
                break
            first, after_rollback = line, False
        return first
    for line in reversed(troubles[:-1]):
        if abs(first["step"] - line.get("last_step", line["step"])) > NEAR:
            break
        first = line
    return first


def _is_long_row(line: dict[str, Any]) -> bool:
    return bool(line["action"] == "skip" and multiplicity(line) >= SKIP_STEPS)


def _where(lines: list[dict[str, Any]]) -> str:
    """The steps of the first few.

    >>> _where([{"step": 4}, {"step": 9, "last_step": 11, "count": 3}])
    'steps 4 and 9 to 11'
    """
    places = [
        f"{line['step']:,}" + (f" to {line['last_step']:,}" if "last_step" in line else "")
        for line in lines
    ]
    places = list(dict.fromkeys(places))
    if len(places) == 1:
        return ("steps " if "to" in places[0] else "step ") + places[0]
    if len(places) > 3:
        return f"steps {', '.join(places[:3])} and others"
    return f"steps {', '.join(places[:-1])} and {places[-1]}"

"""What a person can read of the guard, and how they can overrule it. Runs on the host."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax import lock, sentences
from lbw_optax.alerts import Alert, Listeners, OnEvent, tell
from lbw_optax.appending import Appender, append, opened
from lbw_optax.law import classifier
from lbw_optax.law import events as ring
from lbw_optax.law.custom import Watched
from lbw_optax.law.divergence import after_rollback
from lbw_optax.law.events import Event
from lbw_optax.law.freezing import Freezing
from lbw_optax.law.statistics import in_stds
from lbw_optax.law.telemetry import HISTOGRAM_EDGES
from lbw_optax.paths import path_of
from lbw_optax.sentences import frozen_now, read_events
from lbw_optax.state import MODES, GuardState, find, find_all, find_named, map_guards, of_one_run
from lbw_optax.types import PyTree

_LOG = logging.getLogger("lbw_optax")
# Nothing is printed unless the program asks for it; whoever does finds all of it under this name.
_LOG.addHandler(logging.NullHandler())
# Interventions that come in rows, and how many steps of an unfinished row are kept back at most.
_IN_ROWS, _LONGEST_ROW = ("skip", "clip"), ring.SIZE


class GuardExhausted(RuntimeError):
    """The guard has used up what it may do; the run needs a person."""


def metrics(state: PyTree) -> dict[str, jax.Array]:
    """The guard's signals and decisions of the newest step, as a flat dict of scalars.

    Works on any optimizer state that holds a guard, also inside ``jit``. A signal that could not be
    measured in this step keeps its last value. Where there are several guards, each name begins
    with the path of its guard in the state, ``inner_states/decoder/inner_state/scale``.

    ==========================  ====================================================================
    ``scale``                   factor of the updates; observing or chained, what it would be
    ``mode``                    0: it governs; 1: it only observes
    ``regime``                  index into ``lbw_optax.REGIMES``
    ``gradient_norm``           length of the gradients
    ``update_norm``             length of the step, at the scale held before it
    ``parameter_norm``          length of the parameters before the step
    ``relative_step``           length of the step over that of the parameters, free of width
    ``overshoot``               cosine of the gradients with the way of late; > 0: it was too far
    ``overshoot_level``         its mean, in standard deviations of one; held at 1
    ``loss``                    as it was passed
    ``loss_trend``              fast less slow mean, in first losses; < 0: it falls
    ``nonfinite_gradients``     leaves with one; likewise ``nonfinite_updates``, ``nonfinite_loss``
    ``updates_broken``          bool, their length jumped beyond any step of an optimizer
    ``parameters_broken``       bool, they are not finite, or longer than a step can make them
    ``age``                     steps since the law began: at the start, or after a jump of the rate
    ``skips``                   skipped steps in all; ``skips_in_a_row`` up to now
    ``rejected_share``          share of the last 1000 steps rejected or limited; above 0.05: alarm
    ``events``                  interventions in all
    ``outstanding``             interventions that are not yet earned back, of the budget
    ``exhausted``               bool, the guard has used up what it may do
    ``rollback_asked``          a `lbw_optax.law.divergence.Reason`, 0 for none
    ``frozen_groups``           groups of leaves that stay as they are; names: `frozen_groups`
    ``broken_constraints``      of your own signals and constraints, those that jump or do not hold
    ``policy_share``            share of the law's step that your policy left; 1 without one
    ``risk_10``, ``risk_50``    probability that the run diverges within so many steps; advice only
    ``hard_batch``              if the step stands out, the probability that it is gone by itself;
                                likewise ``unstable_dynamics`` and ``broken_state``
    ``activation_peak``         largest max / RMS of a layer, where `update` is given activations;
                                likewise ``activation_outlier_share``
    ``activation_layer``        the layer with that peak, from 0; -1 before any
    ``activation_spread``       standard deviation of the layers' log peaks; ``activation_drift``
                                how far it is above its slow mean, in standard deviations of it
    ``attention_logit``         the largest; ``nonfinite_activations`` layers with one
    ``gradient_log2/k``         sampled gradient coordinates with 2^k <= abs(g) < 2^(k+2)
    ==========================  ====================================================================

    Raises:
      ValueError: if the state holds no guard.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), lbw_optax.adamw(1e-3))
      >>> m = lbw_optax.metrics(tx.init(jnp.ones(3)))
      >>> print(f"{m['scale']:.2f}", lbw_optax.REGIMES[int(m["regime"])])
      0.01 recovering
    """
    guards = find_named(state)
    if len(guards) == 1:
        return _metrics(*guards.values())
    return {
        f"{path}/{name}": x for path, guard in guards.items() for name, x in _metrics(guard).items()
    }


def _metrics(guard: GuardState) -> dict[str, jax.Array]:
    seen, remembered, control = guard.telemetry, guard.law.statistics, guard.law.control
    risk, layers = guard.law.classifier.risk, guard.layers
    return {
        "scale": jnp.exp(control.log_scale),
        "mode": guard.mode,
        "regime": control.regime,
        "gradient_norm": seen.gradient_norm,
        "update_norm": seen.update_norm,
        "parameter_norm": seen.parameter_norm,
        "relative_step": seen.relative_step,
        "overshoot": seen.overshoot,
        "overshoot_level": in_stds(remembered.overshoot),
        "loss": seen.loss,
        "loss_trend": remembered.loss.mean - remembered.loss_slow.mean,
        "nonfinite_gradients": seen.nonfinite_gradients,
        "nonfinite_updates": seen.nonfinite_updates,
        "nonfinite_loss": seen.nonfinite_loss,
        "updates_broken": seen.updates_broken,
        "parameters_broken": seen.parameters_broken,
        "age": control.age,
        "skips": control.skips,
        "skips_in_a_row": control.skips_in_a_row,
        "rejected_share": control.rejections.share,
        "events": guard.events.recorded,
        "outstanding": control.outstanding,
        "exhausted": control.exhausted,
        "rollback_asked": guard.law.divergence.rollback_asked,
        "frozen_groups": _frozen(guard),
        **_custom(guard),
        "risk_10": risk.soon,
        "risk_50": risk.later,
        "activation_outlier_share": layers.outlier_share,
        "activation_peak": layers.peak,
        "activation_layer": layers.farthest,
        "activation_spread": layers.spread,
        "activation_drift": layers.drift,
        "attention_logit": layers.attention_logit,
        "nonfinite_activations": layers.nonfinite,
        **{kind.name.lower(): risk.kinds[..., kind] for kind in classifier.Kind},
        **{f"gradient_log2/{k}": seen.histogram[..., i] for i, k in enumerate(HISTOGRAM_EDGES)},
    }


def _custom(guard: GuardState) -> dict[str, jax.Array]:
    watched = guard.custom
    if isinstance(watched, Watched):
        broken = jnp.sum(watched.broken, axis=-1, dtype=jnp.int32)
        return {"broken_constraints": broken, "policy_share": watched.share}
    share = jnp.ones_like(guard.law.control.log_scale)
    return {"broken_constraints": jnp.zeros_like(guard.mode), "policy_share": share}


def _frozen(guard: GuardState) -> jax.Array:
    """How many groups are frozen: int32."""
    if isinstance(guard.freezing, Freezing):
        return jnp.sum(guard.freezing.frozen, axis=-1, dtype=jnp.int32)
    return jnp.zeros_like(guard.mode)


def frozen_groups(state: PyTree) -> dict[str, int]:
    """The layers that are frozen now, and for how many steps they have been. Waits for the device.

    Where there are several guards, each name begins with the path of its guard in the state. Empty
    for a guard without ``groups``.

    Raises:
      ValueError: if the state holds no guard, or several runs in one (``vmap``).

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> tx = lbw_optax.lbw_guard(optax.adamw(1e-3), groups=lbw_optax.by_layer)
      >>> params = {"layers": [{"w": jnp.ones(3)} for _ in range(4)]}
      >>> state = tx.init(params)
      >>> grads = {"layers": [{"w": jnp.full(3, x)} for x in (1.0, jnp.nan, 2.0, 3.0)]}
      >>> _, state = tx.update(grads, state, params, value=1.0)
      >>> lbw_optax.frozen_groups(state)
      {'layers/1': 1}
    """
    guards = find_named(state)
    alone = len(guards) == 1
    return {
        name if alone else f"{path}/{name}": steps
        for path, guard in guards.items()
        for name, steps in frozen_now(of_one_run(guard)).items()
    }


def events(state: PyTree) -> list[Event]:
    """The interventions still in the state's ring, oldest first, as Python values.

    The ring holds 64, and a step makes at most one: read every 64 steps and none is lost. Where
    there are several guards, one's follow another's, and `Event.guard` is the path of each.

    Raises:
      ValueError: if the state holds no guard, or several runs in one (``vmap``).
    """
    guards = find_named(state)
    alone = len(guards) == 1
    return [
        event if alone else event._replace(guard=path)
        for path, guard in guards.items()
        for event in _read_events(guard)
    ]


def _read_events(guard: GuardState) -> list[Event]:
    """Those in its ring; without a loss where it was never given one."""
    found = read_events(of_one_run(guard))
    if int(guard.law.statistics.loss.weight > 0):
        return found
    return [event._replace(loss=None) for event in found]


def check(state: PyTree) -> None:
    """Stop loudly when a guard in this state has used up what it may do. Waits for the device.

    Raises:
      GuardExhausted: with the last interventions and what to do.
      ValueError: if the state holds no guard.
    """
    for guard in find_all(state):
        exhausted = np.asarray(guard.law.control.exhausted)
        if exhausted.any():  # of several runs in one, the first that is
            raise GuardExhausted(sentences.exhausted(_run(guard, exhausted)))


def _run(guard: GuardState, which: np.ndarray) -> GuardState:
    """The first run that is marked, where a state holds several in one; else the guard itself."""
    first = np.unravel_index(which.argmax(), which.shape)
    own = jax.device_get(guard._replace(inner_state=None))
    return jax.tree.map(lambda x: x[first], own)


def override(state: PyTree, *, scale: float | str | None = None, mode: str | None = None) -> PyTree:
    """A human's order: the state with the scale pinned, released, or the mode changed.

    A pure function; it reaches every guard in the state. Without arguments it changes nothing.

    Args:
      state: any optimizer state that holds a guard.
      scale: a number in (0, 1] pins the scale there; "auto" gives it back to the law.
      mode: "govern" or "observe".

    Raises:
      ValueError: if an argument is not one of these, or the state holds no guard.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> state = lbw_optax.adamw(1e-3).init(jnp.ones(3))
      >>> print(lbw_optax.metrics(lbw_optax.override(state, scale=0.5))["scale"])
      0.5
    """
    if mode is not None and not (isinstance(mode, str) and mode in MODES):
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if not (scale is None or _is_order(scale)):
        raise ValueError(f'scale must be a number in (0, 1] or "auto", got {scale!r}.')
    return map_guards(lambda guard: _override(guard, scale, mode), state)


def reset(state: PyTree) -> PyTree:
    """A human's "go on": the state no longer exhausted, with its full allowance.

    A pure function; it reaches every guard in the state. Nothing asks for a rollback in what it
    returns, and the level of the loss is learned anew. Scale, statistics and events stay.

    Raises:
      ValueError: if the state holds no guard.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> state = lbw_optax.reset(lbw_optax.adamw(1e-3).init(jnp.ones(3)))
      >>> bool(lbw_optax.metrics(state)["exhausted"])
      False
    """
    return map_guards(_reset, state)


def explain(state: PyTree) -> str:
    """What the guard is doing and why, in a sentence. Waits for the device.

    Raises:
      ValueError: if the state holds no guard, or several.

    Example:
      >>> import jax.numpy as jnp, lbw_optax
      >>> print(lbw_optax.explain(lbw_optax.adamw(1e-3).init(jnp.ones(3))))
      Soft start, step 0: updates at 1 %, growing while steps fall short.
    """
    return sentences.explain(jax.device_get(find(state)._replace(inner_state=None)))


class AuditLog:
    """Append the guard's interventions to a JSON Lines file, one line each.

    A line holds ``number, step, regime, signal, value, threshold, action, scale_before,
    scale_after, loss`` (the newest that was measured), ``rate_multiple`` (what the learning rate is
    multiplied by after it), ``time`` (UTC, when it was read) and ``recorded_at``, the step of the
    loop that read it; of a rollback ``from_step`` and ``to_step`` instead of value and threshold;
    of a layer that is frozen or thaws its name, ``group``.
    Where a state holds several guards, ``guard`` is the path of the one that a line is of. A log
    that is opened again goes on after its last line. If the ring was read too late, a line
    ``{"action": "lost", ...}`` says how many interventions are missing. If the run has gone on from
    an older state, ``{"action": "restored", "from_number": ...}`` says from which one on they are
    written anew. A restored run that does again what is written is no news.

    A row of skipped steps with one cause is one line, with ``count`` and ``last_step``: it is
    written when the row ends, at 64 steps, or with :meth:`close`, so that a kill loses no more than
    that, and nothing that the restored state still has. The same is said in a sentence at once, to
    the logger ``"lbw_optax"``.

    What a call of :meth:`record` adds is in the file as a whole or not at all. Where the disk is
    full, training goes on with one warning, and the next call that can writes what is missing. A
    last line that a kill has torn is cut off when the log is opened again; no other byte of it is
    changed, and lines that are none of ours stay.

    Args:
      path: the file; its folder must exist. One log at a time may be open on it: with several
        processes, open it on the first.
      on_event: a function, or several, that is called with a `lbw_optax.alerts.Alert` for each
        intervention when it is read; for a row when it begins, and when it has ended. What an
        earlier process wrote is no news. An error in it is a warning.

    Raises:
      OSError: if the file cannot be opened, or another log is open on it.
      ValueError: if the file is something else than a log, or this log is closed.
      TypeError: if a step is no whole number, or a line of your own holds what JSON cannot.

    Example:
      >>> import jax.numpy as jnp, tempfile, lbw_optax
      >>> state = lbw_optax.adamw(1e-3).init(jnp.ones(3))
      >>> with lbw_optax.AuditLog(tempfile.mkdtemp() + "/audit.jsonl") as audit:
      ...     audit.record(0, state)
      0
    """

    def __init__(self, path: str | os.PathLike[str], *, on_event: OnEvent = ()):
        self._path = path_of(path, "path")
        self._listeners: Listeners[[Alert]] = Listeners("on_event", on_event)
        self._file = _open_log(self._path)
        self._lines = Appender(self._file, "audit log")
        self._next, self._known = _last_numbers(self._file)
        self._open_rows: dict[str, dict[str, Any]] = {}  # of each guard, what may go on

    def record(self, step: int, state: PyTree) -> int:
        """Write what happened since the last call; returns the number of interventions.

        Waits for the device: call it every so many steps, 64 at the most.
        """
        if self._file.closed:
            raise ValueError(f"This AuditLog of {self._path} is closed: open a new one.")
        step = whole_step(step)
        guards = find_named(state)
        paths = [""] if len(guards) == 1 else list(guards)
        written: list[dict[str, Any]] = []
        said: list[dict[str, Any]] = []
        known: dict[str, dict[int, dict[str, Any]]] = {}
        count = 0
        open_rows: dict[str, dict[str, Any]] = {}
        act: dict[str, bool] = {}
        for path, guard in zip(paths, guards.values(), strict=True):
            act[path] = sentences.acts(of_one_run(guard))
            fresh = self._news(path, of_one_run(guard), step)
            before = [self._open_rows[path]] if path in self._open_rows else []
            lines = _in_rows(before, fresh)
            said += lines[len(before) :]
            new = {line["number"]: line for line in fresh if "number" in line}
            known[path] = self._known.get(path, {}) | new
            count += len(new)
            if lines and _may_go_on(lines[-1], int(guard.guard_steps)):
                open_rows[path] = lines.pop()
            said += [line for line in lines[: len(before)] if "count" in line]
            written += lines
        self._open_rows = open_rows
        for path, guard in zip(paths, guards.values(), strict=True):
            self._next[path] = recorded = int(guard.events.recorded)
            in_ring = range(recorded - ring.SIZE, recorded)
            self._known[path] = {n: line for n, line in known[path].items() if n in in_ring}
        self._write(written)
        for line in said:
            told = sentences.logged(line, acts=act[line.get("guard", "")])
            tell(self._listeners, *told, step, as_json(line))
        return count

    def note(self, recorded_at: int, **facts: Any) -> None:
        """Write a line of your own, as what a person has ordered.

        Args:
          recorded_at: the step of the loop, as in the guard's own lines.
          facts: the rest of the line: numbers, words, None, arrays, and lists and dicts of them.
            ``action`` should say what it is.
        """
        if self._file.closed:
            raise ValueError(f"This AuditLog of {self._path} is closed: open a new one.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        # The name that nobody else's line begins with comes first: see `_BEGINNINGS`.
        self._write([{"recorded_at": whole_step(recorded_at), "time": now, **facts}])

    def _news(self, path: str, guard: GuardState, step: int) -> list[dict[str, Any]]:
        """What one guard did since the last call."""
        recorded, known = int(guard.events.recorded), self._known.get(path, {})
        in_ring = [
            event._replace(guard=path)._asdict() | {"rate_multiple": event.scale_after}
            for event in _read_events(guard)
        ]
        # After a restore the count is lower than what is written, or it has grown again with events
        # that differ from those: go on from there.
        others = [x["number"] for x in in_ring if _is_another(known.get(x["number"], {}), x)]
        written = self._next.get(path, 0)
        first = min(written, recorded, *others)
        lines = [line for line in in_ring if line["number"] >= first]
        now = math.exp(float(guard.law.control.log_scale))
        seen = {"guard": path, "loss": float(guard.telemetry.loss), "rate_multiple": now}
        lost = recorded - first - len(lines)
        if lost:
            lines.insert(0, {"action": "lost", "interventions": lost, **seen})
        if first < written:
            lines.insert(0, {"action": "restored", "from_number": first, **seen})
        read_at = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "recorded_at": step}
        # What an event does not have, as a rollback a threshold, is not in its line.
        return [{k: x for k, x in line.items() if x not in (None, "")} | read_at for line in lines]

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = [json.dumps(as_json(line), allow_nan=False) + "\n" for line in lines]
        self._lines.add("".join(text))

    def close(self) -> None:
        """Write what was kept back, and close the file."""
        if self._file.closed:
            return
        rows, self._open_rows = list(self._open_rows.values()), {}
        try:
            self._write(rows)
            self._lines.close()
        finally:
            lock.release(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _in_rows(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of equal interventions in steps that follow one another become one, with a count."""
    rows = list(rows)
    for line in lines:
        if rows and _goes_on(rows[-1], line):
            count = rows[-1].get("count", 1) + 1
            rows[-1] = rows[-1] | {"count": count, "last_step": line["step"]}
        else:
            rows.append(line)
    return rows


# What tells two events of one number apart.
_OWN = ("step", "action", "signal", "value", "scale_after", "from_step", "to_step", "group")


def _is_another(known: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether an event is not the one that is known to be written under its number."""
    line = as_json(line)
    return "step" in known and any(known[k] != line.get(k) for k in _OWN if k in known)


def _goes_on(row: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether this line is the next step of that row."""
    if row["action"] not in _IN_ROWS or row.get("count", 1) >= _LONGEST_ROW:
        return False
    same = all(row[k] == line.get(k) for k in ("action", "signal", "regime"))
    count = row.get("count", 1)
    follows = line.get("number") == row["number"] + count
    return same and follows and line.get("step") == row["step"] + count


def _may_go_on(row: dict[str, Any], guard_steps: int) -> bool:
    """Whether the step that the guard takes next may belong to this row."""
    newest = row.get("last_step", row.get("step"))
    short = row.get("count", 1) < _LONGEST_ROW
    return row["action"] in _IN_ROWS and short and newest == guard_steps - 1


def _is_order(scale: Any) -> bool:
    """Whether the scale is "auto", a traced scalar, or a number in (0, 1] that float32 can hold."""
    if isinstance(scale, str):
        return scale == "auto"
    if isinstance(scale, jax.core.Tracer):
        return scale.shape == ()
    number = np.asarray(scale)
    is_real = number.ndim == 0 and number.dtype.kind in "fiu"
    return is_real and bool(np.finfo(np.float32).tiny <= number <= 1)


def _override(guard: GuardState, scale: float | str | None, mode: str | None) -> GuardState:
    control = guard.law.control
    if isinstance(scale, str):
        control = control._replace(pinned=jnp.zeros_like(control.pinned))
    elif scale is not None:
        # A traced order is not known here: it is kept in bounds, and one that is no number is none.
        wanted = jnp.log(jnp.clip(jnp.asarray(scale, jnp.float32), jnp.finfo(jnp.float32).tiny, 1))
        log_scale = jnp.where(jnp.isfinite(wanted), wanted, control.log_scale)
        control = control._replace(log_scale=log_scale, pinned=jnp.ones_like(control.pinned))
    number = guard.mode if mode is None else jnp.full_like(guard.mode, MODES.index(mode))
    return guard._replace(law=guard.law._replace(control=control), mode=number)


def _reset(guard: GuardState) -> GuardState:
    control, divergence = guard.law.control, guard.law.divergence
    control = control._replace(
        exhausted=jnp.zeros_like(control.exhausted),
        skips_in_a_row=jnp.zeros_like(control.skips_in_a_row),
        outstanding=jnp.zeros_like(control.outstanding),
    )
    # The level of the loss is learned anew, or a loss that has risen would ask again at once.
    # Each leaf is an array of its own: a buffer that two leaves share cannot be donated.
    fresh = jax.tree.map(
        lambda old, new: jnp.copy(jnp.broadcast_to(new, jnp.shape(old))),
        divergence,
        after_rollback(divergence),
    )
    return guard._replace(law=guard.law._replace(control=control, divergence=fresh))


def whole_step(step: Any) -> int:
    """The step as a Python integer, whatever holds it: any later line may have to be written."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = int(step)
        if number == step and not isinstance(step, bool):
            return number
    raise TypeError(f"The step of a line in a log is an integer, got {step!r}.")


def as_json(x: Any) -> Any:
    """Of numbers, words and arrays, in lists and dicts too, what JSON can hold.

    As the standard has it, numbers that are not finite become null.
    """
    if isinstance(x, dict):
        return {str(name): as_json(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [as_json(value) for value in x]
    if x is None or isinstance(x, str | int):
        return x
    found = np.asarray(x)
    if jnp.issubdtype(found.dtype, jnp.floating):  # the narrow ones, too
        wide = found.astype(np.float64)
        return np.where(np.isfinite(wide), wide.astype(object), np.array(None)).tolist()
    if found.dtype == bool or jnp.issubdtype(found.dtype, jnp.integer):
        return found.astype(object).tolist()
    raise TypeError(f"A line of the audit log holds numbers, words, lists and dicts, got {x!r}.")


# Of the lines that a log writes.
_BEGINNINGS = (b'{"number":', b'{"action":', b'{"recorded_at":')


def _open_log(path: Path) -> FileIO:
    """The file, for this log alone, and made to end with a whole line."""
    file = opened(path)
    try:
        if not lock.claim(file):
            raise OSError(
                f"Another AuditLog is open on {path}: close it, or pass another path. With several "
                "processes only the first needs one."
            )
        _end_with_a_line(file)
    except BaseException:
        file.close()
        raise
    return file


def _end_with_a_line(file: FileIO) -> None:
    """Cut off the torn line that a kill has left, in place; anything else that is torn stays."""
    content = _read(file)
    torn = content[content.rfind(b"\n") + 1 :]
    is_ours = any(torn.startswith(x[: len(torn)]) for x in _BEGINNINGS)
    is_ours = is_ours or not torn.strip(b"\0")  # zeros: the power went off
    whole = content[: len(content) - len(torn)]
    if (whole.strip() or not is_ours) and next(_objects(whole), None) is None:
        raise ValueError(f"{file.name} is no audit log: pass another path.")
    if torn and is_ours:
        file.truncate(len(whole))
    elif torn:
        append(file, b"\n")


def _last_numbers(
    file: FileIO,
) -> tuple[dict[str, int], dict[str, dict[int, dict[str, Any]]]]:
    """Of each guard, one past the last event in the file, and the last events by number."""
    newest: dict[str, int] = {}
    known: dict[str, dict[int, dict[str, Any]]] = {}
    for line in _objects(_read(file)):
        guard = str(line.get("guard", ""))
        restored = line.get("action") == "restored"
        number = line.get("from_number" if restored else "number")
        if type(number) is not int or number < 0:
            continue
        count = line.get("count", 1)
        count = 0 if restored else count if type(count) is int and count > 0 else 1
        past = newest.setdefault(guard, number + count)
        for at in range(max(number, past - ring.SIZE), min(number + count, past)):
            known.setdefault(guard, {}).setdefault(at, _of_row(line, at - number))
    return newest, known


def _of_row(line: dict[str, Any], i: int) -> dict[str, Any]:
    """What a line says of the event that is i-th in its row: all of the first, of others the step.

    >>> _of_row({"step": 5, "action": "skip", "signal": "loss", "value": 2.0, "count": 3}, 2)
    {'step': 7, 'action': 'skip', 'signal': 'loss'}
    """
    step = line.get("step")
    if i == 0 or type(step) is not int:
        return line if i == 0 else {}
    return {"step": step + i} | {k: line[k] for k in ("action", "signal") if k in line}


def _objects(content: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines, last first."""
    for line in reversed(content.split(b"\n")):
        try:
            read = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(read, dict):
            yield read


def _read(file: FileIO) -> bytes:
    file.seek(0)
    return file.readall() or b""

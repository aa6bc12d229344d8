"""What a person can read of the guard, and how they can overrule it. Runs on the host."""

import json
import math
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax import lock
from lbw_optax.law import events as ring
from lbw_optax.law.control import REGIMES
from lbw_optax.law.events import Event
from lbw_optax.law.telemetry import HISTOGRAM_EDGES
from lbw_optax.state import MODES, GuardState, find, find_all, map_guards


class GuardExhausted(RuntimeError):
    """The guard has used up what it may do; the run needs a person."""


def metrics(state: Any) -> dict[str, jax.Array]:
    """The guard's signals and decisions of the newest step, as a flat dict of scalars.

    Works on any optimizer state that holds one guard, also inside ``jit``. A signal that could
    not be measured in this step keeps its last value. ``gradient_log2/k`` counts the sampled
    gradient coordinates with 2^k <= abs(g) < 2^(k+2).

    Raises:
      ValueError: if the state holds no guard, or several.

    Example:
      >>> import jax.numpy as jnp, optax, lbw_optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), lbw_optax.adamw(1e-3))
      >>> m = lbw_optax.metrics(tx.init(jnp.ones(3)))
      >>> print(f"{m['scale']:.2f}", lbw_optax.REGIMES[int(m["regime"])])
      0.01 recovering
    """
    guard = find(state)
    seen = guard.telemetry._asdict()
    histogram = seen.pop("histogram")
    control = guard.control
    return {
        "scale": jnp.exp(control.log_scale),
        "regime": control.regime,
        **{name: x for name, x in seen.items() if not name.startswith("has_")},
        "loss_trend": guard.statistics.loss.mean - guard.statistics.loss_slow.mean,
        "skips": control.skips,
        "skips_in_a_row": control.skips_in_a_row,
        "events": guard.ring.recorded,
        "outstanding": control.outstanding,
        "exhausted": control.exhausted,
        "rollback_asked": guard.distress.rollback_asked,
        **{f"gradient_log2/{k}": histogram[..., i] for i, k in enumerate(HISTOGRAM_EDGES)},
    }


def events(state: Any) -> list[Event]:
    """The interventions still in the state's ring, oldest first, as Python values.

    The ring holds 64, and a step makes at most one: read every 64 steps and none is lost.

    Raises:
      ValueError: if the state holds no guard, or several.
    """
    return ring.read(find(state).ring)


def check(state: Any) -> None:
    """Stop loudly when a guard in this state has used up what it may do. Waits for the device.

    Raises:
      GuardExhausted: with the last interventions and what to do.
      ValueError: if the state holds no guard.
    """
    for guard in find_all(state):
        if bool(guard.control.exhausted):
            raise GuardExhausted(_obituary(guard))


def override(state: Any, *, scale: float | str | None = None, mode: str | None = None) -> Any:
    """A human's order: the state with the scale pinned, released, or the mode changed.

    A pure function; it reaches every guard in the state, clears "exhausted" and what asks for a
    rollback, and gives each its full allowance again.

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
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if not (scale is None or _is_order(scale)):
        raise ValueError(f'scale must be a number in (0, 1] or "auto", got {scale!r}.')
    return map_guards(lambda guard: _override(guard, scale, mode), state)


class AuditLog:
    """Append the guard's interventions to a JSON Lines file, one line each.

    A line holds ``number, step, regime, signal, value, threshold, action, scale_before,
    scale_after`` and ``recorded_at``, the step of the loop that wrote it. A log that is opened
    again goes on after its last line. If the ring was read too late, a line
    ``{"action": "lost", ...}`` says how many interventions are missing.

    What a call of :meth:`record` adds is in the file as a whole or not at all: after a disk was
    full, the next call writes what is missing. A last line that a kill has torn is cut off when the
    log is opened again; no other byte of it is changed, and lines that are none of ours stay.

    Args:
      path: the file; its folder must exist. One log at a time may be open on it: with several
        processes, open it on the first.

    Raises:
      OSError: if the file cannot be written, or another log is open on it.
      ValueError: if the file is something else than a log, or this log is closed.

    Example:
      >>> import jax.numpy as jnp, tempfile, lbw_optax
      >>> state = lbw_optax.adamw(1e-3).init(jnp.ones(3))
      >>> with lbw_optax.AuditLog(tempfile.mkdtemp() + "/audit.jsonl") as audit:
      ...     audit.record(0, state)
      0
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._file = _open_log(self._path)
        self._next = _next_number(self._file)

    def record(self, step: int, state: Any) -> int:
        """Write what happened since the last call; returns the number of interventions written.

        Waits for the device: call it every so many steps, 64 at the most.
        """
        if self._file.closed:
            raise ValueError(f"This AuditLog of {self._path} is closed: open a new one.")
        guard = find(state)
        recorded = int(guard.ring.recorded)
        # After a restore the count is lower than what is written: go on from there.
        first = min(self._next, recorded)
        new = [event for event in ring.read(guard.ring) if event.number >= first]
        lost = recorded - first - len(new)
        said: list[dict[str, Any]] = [event._asdict() for event in new]
        if lost:
            said.insert(0, {"action": "lost", "interventions": lost})
        self._write([{**line, "recorded_at": step} for line in said])
        self._next = recorded
        return len(new)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(_as_json(line), allow_nan=False) + "\n" for line in lines)
        try:
            _append(self._file, text.encode())
        except OSError as error:
            raise OSError(
                error.errno,
                f"The audit log {self._path} cannot be written ({error.strerror}): free space "
                "there; the next call writes what is missing",
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_order(scale: Any) -> bool:
    """Whether the scale is "auto", a traced scalar, or a number in (0, 1] that float32 can hold."""
    if isinstance(scale, str):
        return scale == "auto"
    if isinstance(scale, jax.core.Tracer):
        return scale.shape == ()
    return np.ndim(scale) == 0 and bool(np.finfo(np.float32).tiny <= scale <= 1)


def _override(guard: GuardState, scale: float | str | None, mode: str | None) -> GuardState:
    fresh = {
        name: jnp.zeros_like(getattr(guard.control, name))
        for name in ("exhausted", "skips_in_a_row", "outstanding")
    }
    control = guard.control._replace(**fresh)
    if isinstance(scale, str):
        control = control._replace(pinned=jnp.zeros_like(control.pinned))
    elif scale is not None:
        log_scale = jnp.full_like(control.log_scale, jnp.log(scale))
        control = control._replace(log_scale=log_scale, pinned=jnp.ones_like(control.pinned))
    number = guard.mode if mode is None else jnp.full_like(guard.mode, MODES.index(mode))
    return guard._replace(
        control=control,
        mode=number,
        distress=guard.distress._replace(
            rollback_asked=jnp.zeros_like(guard.distress.rollback_asked)
        ),
    )


def _obituary(guard: GuardState) -> str:
    history = "; ".join(
        f"step {e.step}: {e.action} for {e.signal} = {e.value:.3g} (threshold {e.threshold:.3g})"
        for e in ring.read(guard.ring)[-5:]
    )
    control = jax.device_get(guard.control)
    return (
        f"The guard is exhausted after {int(guard.guard_steps)} steps: {int(control.skips)} "
        f"skipped in all, {int(control.skips_in_a_row)} in a row, "
        f"scale {math.exp(control.log_scale):.3g}, regime {REGIMES[control.regime]}. "
        f"Last interventions: {history}. The parameters are as they were before the skipped "
        "steps. Look at the data and the learning rate, restore an earlier checkpoint, or go on "
        "with lbw_optax.override(state), which clears this."
    )


# Of the lines that a log writes.
_BEGINNINGS = (b'{"number":', b'{"action":')


def _open_log(path: Path) -> FileIO:
    """The file, for this log alone, and made to end with a whole line."""
    file = FileIO(path, "a+")
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
        _append(file, b"\n")


def _next_number(file: FileIO) -> int:
    """One past the last event in the file."""
    numbers = (line.get("number") for line in _objects(_read(file)))
    return next((n for n in numbers if type(n) is int and n >= 0), -1) + 1


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


def _append(file: FileIO, content: bytes) -> None:
    """All of it, or nothing: what a full disk has cut short is taken back."""
    size, rest = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        file.truncate(size)
        raise


def _as_json(line: dict[str, Any]) -> dict[str, Any]:
    """As the standard has it: numbers that are not finite become null."""
    broken = [k for k, x in line.items() if isinstance(x, float) and not math.isfinite(x)]
    return line | dict.fromkeys(broken)

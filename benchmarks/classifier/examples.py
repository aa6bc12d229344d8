"""What a predictor is given and what it should say: inputs step by step, and labels.

Runs of any source become `Runs`: the loss as it was logged, what the guard saw, and where the run
diverges by `lbw_optax.law.outcome`. After that step nothing is asked of a predictor.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.classifier.tasks import BROKEN, Lanes
from lbw_optax import law
from lbw_optax.law import classifier, control, outcome, statistics, telemetry
from lbw_optax.law.classifier import HORIZONS, Kind, View
from lbw_optax.law.control import Bounds

NEVER = 10**6
# The law reads a log at scale 1: nothing intervenes.
_BOUNDS = Bounds(min_scale=1.0)
# What is gone within so many steps was a hard batch, unless a divergence follows within so many.
GONE, FOLLOWS = 5, 50
# Runs are read so many at a time, and so many steps of them.
ROWS, CHUNK = 64, 256


class Runs(NamedTuple):
    """Runs of one length; shorter ones are filled up at the end, where `given` is False."""

    logged: np.ndarray  # float32[runs, steps], the loss; may be NaN or infinite
    seen: dict[str, np.ndarray]  # scalars of Telemetry by name, [runs, steps]
    given: np.ndarray  # bool[runs, steps]
    begins: np.ndarray  # int[runs], where the rise of a run that diverges begins, or its length
    ends: np.ndarray  # int[runs], where it has diverged, or its length
    diverges: np.ndarray  # bool[runs]
    broken: np.ndarray  # bool[runs], what diverges does so for a broken state or a NaN
    strikes: np.ndarray  # int[runs], when a fault that nothing announces strikes; `NEVER` for none


class Examples(NamedTuple):
    """What a predictor learns from and is judged by, [runs, steps] each but for the inputs."""

    inputs: np.ndarray  # float32[runs, steps, 16]
    # bool: before the end of the run, and before it has diverged; but not in the fifty steps before
    # a fault strikes, for how likely a fault is here says nothing of any run.
    asked: np.ndarray
    until: np.ndarray  # int: steps until it diverges; a large number if it does not
    kind: np.ndarray  # int: a `Kind` where the step stands out, else -1
    excess: np.ndarray  # float32, the law's own evidence of a lasting rise
    overshoot: np.ndarray  # float32, its mean in standard deviations, as the law has it


def of_guard(told: dict[str, np.ndarray], befell: Lanes) -> Runs:
    """Of runs made here, and of what befell them."""
    logged = told["logged"]
    seen = {name: x for name, x in told.items() if name != "logged"}
    strikes = np.where(befell.fault == "none", NEVER, befell.at)
    broken = np.isin(befell.fault, BROKEN)
    return _runs(logged, seen, np.full(logged.shape, True), broken, strikes)


def of_log(loss: np.ndarray, norm: np.ndarray | None, given: np.ndarray) -> Runs:
    """Of logs of a loss, and of a gradient norm or none: the guard sees what `diagnose` sees."""
    is_number = np.isfinite(loss)
    has_norm = norm is not None
    norms = norm if norm is not None else np.ones_like(loss)
    fine = np.isfinite(norms) & (norms < 1e30)
    seen = {
        "loss": np.where(is_number, np.clip(loss, -1e30, 1e30), 0.0).astype(np.float32),
        "has_loss": is_number,
        "nonfinite_loss": (~is_number).astype(np.int32),
        "gradient_norm": np.where(fine, norms, 1.0).astype(np.float32),
        "has_gradient": fine,
        "nonfinite_gradients": (~fine & has_norm).astype(np.int32),
    }
    return _runs(loss, seen, given, ~is_number.all(1), np.full(len(loss), NEVER))


def of(runs: Runs) -> Examples:
    """Inputs and labels."""
    found, excess, overshoot, stands_out = _replay(runs.seen)
    at = np.arange(runs.logged.shape[1])[None]
    ahead = runs.strikes[:, None] - at
    asked = runs.given & (at < runs.ends[:, None]) & ~((ahead > 0) & (ahead <= max(HORIZONS)))
    until = np.where(runs.diverges[:, None], runs.ends[:, None] - at, NEVER)
    return Examples(found, asked, until, _kinds(runs, stands_out, until), excess, overshoot)


def _runs(logged: Any, seen: Any, given: np.ndarray, broken: Any, strikes: Any) -> Runs:
    lengths = given.sum(1)
    found = [outcome.divergence(x[:n]) for x, n in zip(logged, lengths, strict=True)]
    ends = [n if x is None else x.stands for x, n in zip(found, lengths, strict=True)]
    begins = [n if x is None else x.begins for x, n in zip(found, lengths, strict=True)]
    diverges = np.array([x is not None for x in found])
    return Runs(logged, seen, given, np.array(begins), np.array(ends), diverges, broken, strikes)


def _kinds(runs: Runs, stands_out: np.ndarray, until: np.ndarray) -> np.ndarray:
    """Of steps that stand out: what comes of them says what they were.

    From five steps before the rise of a divergence on they are unstable, or broken. What no longer
    stands out after five steps, with no divergence in the next fifty, was a hard batch. Of the rest
    nothing is said.
    """
    at = np.arange(stands_out.shape[1])[None]
    follows = stands_out & runs.diverges[:, None] & (at >= runs.begins[:, None] - GONE)
    later = np.zeros_like(stands_out)
    for ahead in range(GONE, 2 * GONE):
        later[:, :-ahead] |= stands_out[:, ahead:]
    alone = stands_out & ~later & (until > FOLLOWS)
    of_run = np.where(runs.broken, Kind.BROKEN_STATE, Kind.UNSTABLE_DYNAMICS)[:, None]
    kind = np.where(follows, of_run, np.where(alone, Kind.HARD_BATCH, -1))
    return np.where(runs.given & (at < runs.ends[:, None]), kind, -1)


def _replay(seen: dict[str, np.ndarray]) -> Any:
    """Inputs of the classifier, and what some rules read, of every step.

    In tiles of one shape, so that one program serves runs of every number and length.
    """
    runs, steps = seen["loss"].shape
    rows, columns = -runs % ROWS, -steps % CHUNK
    told = telemetry.init()._asdict()
    del told["histogram"]
    padded = {
        name: np.pad(
            np.broadcast_to(seen.get(name, blank), (runs, steps)), [(0, rows), (0, columns)]
        )
        for name, blank in ((name, np.asarray(x)) for name, x in told.items())
    }
    first = law.init(_BOUNDS), classifier.init().log_norm
    lanes = jax.tree.map(lambda x: jnp.broadcast_to(x, (ROWS, *x.shape)), first)
    strips = []
    for row in range(0, runs, ROWS):
        carry, parts = lanes, []
        for at in range(0, steps, CHUNK):
            tile = {n: x[row : row + ROWS, at : at + CHUNK] for n, x in padded.items()}
            carry, found = _tile(carry, tile)
            parts.append(jax.device_get(found))
        strips.append(jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts))
    return jax.tree.map(lambda *x: np.concatenate(x)[:runs, :steps], *strips)


@jax.jit
@jax.vmap
def _tile(carry: Any, seen: dict[str, Any]) -> Any:
    blank = telemetry.init()

    def one(carry: Any, now: Any) -> Any:
        before, log_norm = carry
        told = blank._replace(**now)
        arrival = control.arrive(told, before.statistics)
        after, _ = law.step(before, told, _BOUNDS)
        view = View(before.statistics, after.statistics, after.divergence, after.control.age, told)
        found, log_norm = classifier.inputs(log_norm, view)
        out = arrival.jumps | arrival.spikes | (arrival.rejected > 0)
        z = jnp.where(told.has_overshoot, statistics.in_stds(after.statistics.overshoot), 0.0)
        return (after, log_norm), (found, after.divergence.loss_excess, z, out)

    return jax.lax.scan(one, carry, seen)

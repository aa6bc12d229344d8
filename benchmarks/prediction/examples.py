"""What a predictor is given and what it should say: inputs step by step, and labels.

Runs of any source become `Runs`: the loss as it was logged, what the guard saw, and where the run
diverges by `lbw_optax.law.outcome`. After that step nothing is asked of a predictor.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lbw_optax import law
from lbw_optax.law import classifier, control, outcome, statistics, telemetry
from lbw_optax.law.classifier import Kind
from lbw_optax.law.control import Bounds

# The law reads a log at scale 1: nothing intervenes.
_BOUNDS = Bounds(min_scale=1.0)
# What is gone within so many steps was a hard batch; a divergence within so many was none.
GONE, FOLLOWS = 5, 50


class Runs(NamedTuple):
    """Runs of one length; shorter ones are filled up at the end, where `given` is False."""

    logged: np.ndarray  # float32[runs, steps], the loss; may be NaN or infinite
    seen: dict[str, np.ndarray]  # scalars of Telemetry by name, [runs, steps]
    given: np.ndarray  # bool[runs, steps]
    ends: np.ndarray  # int[runs], where a run diverges, or its length
    diverges: np.ndarray  # bool[runs]
    broken: np.ndarray  # bool[runs], what diverges does so for a broken state or a NaN


class Examples(NamedTuple):
    """What a predictor learns from and is judged by, [runs, steps] each but for the inputs."""

    inputs: np.ndarray  # float32[runs, steps, 16]
    asked: np.ndarray  # bool: before the end of the run, and of its divergence
    until: np.ndarray  # int: steps until it diverges; a large number if it does not
    kind: np.ndarray  # int: a `Kind` where the step stands out, else -1
    excess: np.ndarray  # float32, the law's own evidence of a lasting rise
    overshoot: np.ndarray  # float32, its mean in standard deviations, as the law has it


NEVER = 10**6


def of_guard(told: dict[str, np.ndarray], broken: np.ndarray) -> Runs:
    """Of runs made here; `broken` says whose fault is one of the state or of the numbers."""
    logged = told["logged"]
    seen = {name: x for name, x in told.items() if name != "logged"}
    return _runs(logged, seen, np.full(logged.shape, True), broken)


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
    return _runs(loss, seen, given, ~is_number.all(1))


def of(runs: Runs) -> Examples:
    """Inputs and labels."""
    found, excess, overshoot, stands_out = (np.asarray(x) for x in _replay(runs.seen))
    at = np.arange(runs.logged.shape[1])[None]
    asked = runs.given & (at < runs.ends[:, None])
    until = np.where(runs.diverges[:, None], runs.ends[:, None] - at, NEVER)
    return Examples(found, asked, until, _kinds(runs, stands_out, until), excess, overshoot)


def _runs(logged: np.ndarray, seen: Any, given: np.ndarray, broken: np.ndarray) -> Runs:
    lengths = given.sum(1)
    ends = [outcome.diverges_at(x[:n]) for x, n in zip(logged, lengths, strict=True)]
    diverges = np.array([end is not None for end in ends])
    last = np.array([n if end is None else end for end, n in zip(ends, lengths, strict=True)])
    return Runs(logged, seen, given, last, diverges, broken)


def _kinds(runs: Runs, stands_out: np.ndarray, until: np.ndarray) -> np.ndarray:
    """Of steps that stand out: what comes of them says what they were.

    What is followed by a divergence within 50 steps is unstable, or broken; what is not, and after
    five steps no longer stands out, was a hard batch; of the rest nothing is said.
    """
    kind = np.full(stands_out.shape, -1)
    follows = stands_out & (until > 0) & (until <= FOLLOWS)
    kind[follows] = np.where(runs.broken[:, None], Kind.BROKEN, Kind.UNSTABLE).repeat(
        kind.shape[1], 1
    )[follows]
    later = np.zeros_like(stands_out)
    for ahead in range(GONE, 2 * GONE):
        later[:, :-ahead] |= stands_out[:, ahead:]
    kind[stands_out & ~follows & ~later & (until > 2 * FOLLOWS)] = Kind.HARD_BATCH
    at = np.arange(kind.shape[1])[None]
    kind[~runs.given | (at >= runs.ends[:, None])] = -1
    return kind


@jax.jit
@jax.vmap
def _replay(seen: dict[str, Any]) -> Any:
    """Inputs of the classifier, and what some rules read, of every step."""
    blank = telemetry.init()

    def one(carry: Any, now: Any) -> Any:
        before, log_norm = carry
        told = blank._replace(**now)
        arrival = control.arrive(told, before.statistics)
        after, _ = law.step(before, told, _BOUNDS)
        found, log_norm = classifier.inputs(log_norm, before, after, told)
        out = arrival.jumps | arrival.spikes | (arrival.rejected > 0)
        z = jnp.where(told.has_overshoot, statistics.in_stds(after.statistics.overshoot), 0.0)
        return (after, log_norm), (found, after.divergence.loss_excess, z, out)

    _, told = jax.lax.scan(one, (law.init(_BOUNDS), classifier.init().log_norm), seen)
    return told

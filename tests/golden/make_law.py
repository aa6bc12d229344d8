"""Golden numbers of the law: made-up runs, and what it decides in every step of them.

Run ``python tests/golden/make_law.py`` from the project's root after the law has been changed on
purpose, with `LAW` raised in `lbw_optax/law/control.py`. It writes `law.json` (the law's name and
every constant of it) and `law.npz` (the signals of each run, and the outputs).
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE = Path(__file__).with_name("law.npz")
sys.path.insert(0, str(FILE.parent.parent))

from trajectories import BOUNDS, DISTRESSED, batch, scan  # noqa: E402

from lbw_optax.law import control, divergence, statistics, telemetry  # noqa: E402
from lbw_optax.law.telemetry import Telemetry  # noqa: E402

SIGNALS = (
    *("gradient_norm", "overshoot", "relative_step", "loss"),
    *("nonfinite_gradients", "nonfinite_loss", "nonfinite_updates"),
    *("updates_broken", "parameters_broken"),
    *("has_gradient", "has_step", "has_overshoot", "has_loss"),
)
CONSTANTS = {
    telemetry: (
        *("PROBE_LEAVES", "PROBE_SHARE", "PROBE_LEAST", "PROBE_MOST", "HORIZON", "LEAST_HORIZON"),
        *("SIDE", "LEAST_SIDE", "UPDATE_JUMP", "PARAMETER_JUMP"),
    ),
    control: (
        *("SET_POINT", "GROWTH", "CUT", "MOST", "FIRST_ALARM"),
        *("SETTLED_FROM", "CEILING", "FULL", "TRUST", "JUMP", "FALL", "OTHER_STEPS"),
        *("JUMPS_FROM", "FORGOTTEN", "FIRST_STEP", "FIRST_SCALE", "TURN", "COOL_DOWN", "EARNED"),
        *("LOW", "REST_STEPS", "LONG_RUN", "REJECTED_BOUND", "REJECTED_FROM"),
    ),
    statistics: (
        *("WINSOR", "LARGEST", "GRADIENT", "SPAN", "LEAST_SPAN", "OVERSHOOT_FLOOR"),
        *("SPIKE_STDS", "SPIKE_FACTOR", "LONGEST_ROW"),
        *("LOSS", "LOSS_SLOW", "START_STEPS"),
    ),
    divergence: (
        *("INNER_STEPS", "SKIP_STEPS", "FIRST_STEPS", "NEXT_STEPS", "MARGIN_STDS"),
        *(
            "MOST_EVIDENCE",
            "ENOUGH_EVIDENCE",
            "AUTOCORRELATION_SHARE",
            "FARTHEST",
            "MOST_AUTOCORRELATION",
            "GRACE",
        ),
        *("LEAST_STD", "FORGOTTEN", "RETURN_STEPS", "TOLERANCE", "RECENT_SHARE", "TINY"),
        *("RETURN_WITHIN", "SUDDEN", "OFTEN"),
    ),
}


def constants() -> dict[str, Any]:
    """Every number of the law by its name."""
    found = {name: getattr(module, name) for module, names in CONSTANTS.items() for name in names}
    return json.loads(json.dumps(found | {"BOUNDS": BOUNDS}))


def golden_runs() -> dict[str, np.ndarray]:
    """The signals of every run, stacked: one array a signal, of shape (runs, steps)."""
    runs = [batch(steps) for steps in DISTRESSED.values()]
    return {name: np.stack([getattr(run, name) for run in runs]) for name in SIGNALS}


def outputs(signals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the law makes of every step of every run, of shape (runs, steps)."""
    runs, steps = signals["loss"].shape
    nothing = batch([next(iter(DISTRESSED.values()))[0]] * steps)
    found = [
        _outputs(nothing._replace(**{name: x[run] for name, x in signals.items()}))
        for run in range(runs)
    ]
    return {name: np.stack([run[name] for run in found]) for name in found[0]}


def _outputs(seen: Telemetry) -> dict[str, np.ndarray]:
    (_, held, asking), decision = jax.device_get(scan(seen, BOUNDS))
    return {
        "log_scale": held.log_scale,
        "log_applied": np.log(decision.scale),
        "outstanding": held.outstanding,
        "loss_excess": asking.loss_excess,
        "regime": decision.regime.astype(np.int8),
        "exhausted": held.exhausted,
        "signal": decision.signal.astype(np.int8),
        "action": decision.action.astype(np.int8),
        "skip": decision.skip,
        "rollback_asked": asking.rollback_asked.astype(np.int8),
    }


if __name__ == "__main__":
    signals = golden_runs()
    FILE.with_suffix(".json").write_text(
        json.dumps(
            {"law": control.LAW, "runs": list(DISTRESSED), "constants": constants()}, indent=1
        )
        + "\n"
    )
    np.savez_compressed(
        FILE,
        allow_pickle=False,
        **{f"signals/{name}": x for name, x in signals.items()},
        **{f"outputs/{name}": x for name, x in outputs(signals).items()},
    )

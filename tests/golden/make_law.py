"""Golden numbers of the law: made-up runs, and what it decides in every step of them.

Run ``python tests/golden/make_law.py`` from the project's root after the law has been changed on
purpose, with `LAW` raised in `lbw_optax/law/control.py`. It writes `law.json` (the law's name and
every constant of it) and `law.npz` (the signals of each run, and the outputs). Other outputs under
the name of a law that is there are refused, unless --same-law says why.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE = Path(__file__).with_name("law.npz")
sys.path.insert(0, str(FILE.parent.parent))

from trajectories import BOUNDS, DIVERGING, batch, scan  # noqa: E402

from lbw_optax.law import control, divergence, statistics, telemetry  # noqa: E402
from lbw_optax.law.telemetry import Telemetry  # noqa: E402

SIGNALS = (
    *("gradient_norm", "overshoot", "relative_step", "loss"),
    *("nonfinite_gradients", "nonfinite_loss", "nonfinite_updates"),
    *("updates_broken", "parameters_broken"),
    *("has_gradient", "has_step", "has_overshoot", "has_loss"),
)
TOLERANCE = {"log_scale": 5e-4, "log_applied": 5e-4, "outstanding": 1e-3, "loss_excess": 2e-3}
"""Absolute; all else is equal. Float32 on another processor or jax differs by less than a tenth."""
MODULES = (telemetry, statistics, control, divergence)


def constants() -> dict[str, Any]:
    """Every number of the law by its module and name: all that stand alone in capitals."""
    found = {
        f"{module.__name__.rpartition('.')[2]}.{name}": x
        for module in MODULES
        for name, x in vars(module).items()
        if name.isupper() and isinstance(x, int | float | statistics.Memory)
    }
    return json.loads(json.dumps(found | {"BOUNDS": BOUNDS}))


def golden_runs() -> dict[str, np.ndarray]:
    """The signals of every run, stacked: one array a signal, of shape (runs, steps)."""
    runs = [batch(steps) for steps in DIVERGING.values()]
    return {name: np.stack([getattr(run, name) for run in runs]) for name in SIGNALS}


def outputs(signals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the law makes of every step of every run, of shape (runs, steps)."""
    runs, steps = signals["loss"].shape
    nothing = batch([next(iter(DIVERGING.values()))[0]] * steps)
    found = [
        _outputs(nothing._replace(**{name: x[run] for name, x in signals.items()}))
        for run in range(runs)
    ]
    return {name: np.stack([run[name] for run in found]) for name in found[0]}


def _outputs(seen: Telemetry) -> dict[str, np.ndarray]:
    state, decision = jax.device_get(scan(seen, BOUNDS))
    held, asking = state.control, state.divergence
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


def differences(
    found: dict[str, np.ndarray], stored: Mapping[str, np.ndarray], runs: Sequence[str]
) -> dict[str, list[str]]:
    """The runs in which an output is not the stored one, by output."""
    differ: dict[str, list[str]] = {}
    for name, x in found.items():
        before = stored[f"outputs/{name}"]
        if x.shape != before.shape:
            differ[name] = ["there are other runs"]
            continue
        off = np.abs(x.astype(float) - before.astype(float)) > TOLERANCE.get(name, 0)
        if off.any():
            differ[name] = [runs[i] for i in np.flatnonzero(off.any(axis=1))]
    return differ


def main(arguments: Sequence[str] | None = None, file: Path = FILE) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--same-law",
        metavar="REASON",
        help="write other numbers under the same name, as for a law that was never landed; the "
        "reason is stored",
    )
    options = parser.parse_args(arguments)
    stated, stored = json.loads(file.with_suffix(".json").read_text()), np.load(file)
    signals = golden_runs()
    found = outputs(signals)
    document = {"law": control.LAW, "runs": list(DIVERGING), "constants": constants()}
    differ = differences(found, stored, stated["runs"])
    if stated["law"] == control.LAW:
        if differ and options.same_law is None:
            parser.exit(
                2, f"Law {control.LAW} decides otherwise ({differ}): raise LAW, or --same-law.\n"
            )
        reasons = stated.get("same_law", []) + [options.same_law] * bool(differ)
        document |= {"same_law": reasons} if reasons else {}
    file.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    if differ:
        np.savez_compressed(
            file,
            allow_pickle=False,
            **{f"signals/{name}": x for name, x in signals.items()},
            **{f"outputs/{name}": x for name, x in found.items()},
        )


if __name__ == "__main__":
    main()

"""What a finished run leaves in its directory: ``result.json``, ``figure.png``, ``report.html``."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from lbw_optax import Event
from lbw_optax.law.control import LAW
from lbw_optax.report import report
from train import figure, jsonl, rundir
from train.logs import history
from train.options import Options, as_json
from train.provenance import provenance


def write(
    options: Options, perplexity: dict[str, float], targets: dict[str, int], *, seconds: float
) -> None:
    """Figure, numbers and report, from the log; `seconds` are those of the last process.

    A held-out perplexity is over the first "targets" tokens of a split: each counts once, predicted
    from at most "context" tokens before it, in windows that begin every "stride" tokens.
    Where ``result.json`` is, the run is finished; the report, which says so, comes after it.
    """
    logged = history(options.out)
    document = {
        **provenance(),
        "law": LAW,
        "options": as_json(options),
        "perplexity": perplexity,
        "targets": targets,
        "context": options.length,
        "stride": options.length,
        "seconds": round(seconds, 2),
        "tokens_per_second": _median(logged.get("tokens_per_second")),
        "mfu": _median(logged.get("mfu")),
    }
    _draw(options, logged)
    rundir.write_json(options.out / "result.json", jsonl.finite(document))
    try:
        report([options.out])
    except (OSError, ValueError) as error:  # the run has ended well without one
        print(f"{options.out} has no report: {error}", file=sys.stderr)


def places(out: Path) -> str:
    """Where what a run has left is, a line each."""
    found = [(what, out / name) for name, what in _LEFT.items() if (out / name).exists()]
    return "\n".join(f"  {what:<11}{path}" for what, path in found)


_LEFT = {
    "adapter": "adapter",
    "model": "model",
    "result.json": "result",
    "figure.png": "figure",
    "report.html": "report",
    "log.jsonl": "log",
    "events.jsonl": "events",
}


def _draw(options: Options, logged: dict[str, np.ndarray]) -> None:
    curve = figure.Curve(
        options.optimizer,
        logged["loss"],
        logged.get("scale"),
        _events(options),
        valid=np.log(logged["valid_perplexity"]) if "valid_perplexity" in logged else None,
        learning_rate=logged.get("learning_rate"),
        gradient_norm=logged.get("gradient_norm"),
    )
    figure.figure({options.out.name: [curve]}, options.out / "figure.png")


def _median(values: Any) -> float | None:
    return None if values is None else float(np.nanmedian(values))


def _events(options: Options) -> list[Event]:
    """The guard's interventions; lines about other things, a rollback say, are left out."""
    lines = jsonl.read(options.out / "events.jsonl")
    whole = [line for line in lines if set(Event._fields) <= line.keys()]
    return [Event(**{name: line[name] for name in Event._fields}) for line in whole]

"""What a finished run leaves in its directory: ``result.json`` and ``figure.png``."""

from typing import Any

import numpy as np

from lbw_optax import Event
from train import figure, jsonl, rundir
from train.logs import history
from train.options import Options, as_json
from train.provenance import provenance


def write(options: Options, perplexity: dict[str, float], *, seconds: float) -> None:
    """Numbers and figure, from the log; `seconds` are those of the last process.

    A held-out perplexity is over a whole split: each token counts once, predicted from at most
    "context" tokens before it, in windows that begin every "stride" tokens.
    """
    logged = history(options.out)
    document = {
        **provenance(),
        "options": as_json(options),
        "perplexity": perplexity,
        "context": options.length,
        "stride": options.length,
        "seconds": round(seconds, 2),
        "tokens_per_second": _median(logged.get("tokens_per_second")),
        "mfu": _median(logged.get("mfu")),
    }
    rundir.write_json(options.out / "result.json", jsonl.finite(document))
    curve = figure.Curve(options.optimizer, logged["loss"], logged.get("scale"), _events(options))
    figure.figure({options.out.name: [curve]}, options.out / "figure.png")


def _median(values: Any) -> float | None:
    return None if values is None else float(np.nanmedian(values))


def _events(options: Options) -> list[Event]:
    """The guard's interventions; lines about other things, a rollback say, are left out."""
    lines = jsonl.read(options.out / "events.jsonl")
    whole = [line for line in lines if set(Event._fields) <= line.keys()]
    return [Event(**{name: line[name] for name in Event._fields}) for line in whole]

"""Logs of real runs, from a directory of traces: which train the classifier and which judge it.

The two archives are those of AlgoPerf's submissions (`algoperf.npz`: loss and gradient norm, an
entry every hundred steps in most) and of modded-nanogpt's records (`nanogpt.npz`: a loss every
step). By workload, and of nanogpt by record, half of them train it, the other half judges it.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.classifier import examples
from benchmarks.classifier.examples import Runs

SEEN = ("wmt", "imagenet_resnet", "librispeech_conformer_layernorm", "criteo1tb", "ogbg_gelu")
"""Workloads of AlgoPerf that train it."""
FILES = ("algoperf.npz", "nanogpt.npz")


class Log(NamedTuple):
    """The log of one run."""

    workload: str
    loss: np.ndarray
    norm: np.ndarray | None
    seen: bool  # whether it trains the classifier


def read(directory: Path) -> list[Log]:
    """All logs of the two archives; entries without a loss are left out."""
    logs = []
    with np.load(directory / "algoperf.npz") as stored:
        offsets, meta = stored["offsets"], [json.loads(str(x)) for x in stored["meta"]]
        loss, norm = stored["loss"], stored["grad_norm"]
    for i, facts in enumerate(meta):
        part = slice(offsets[i], offsets[i + 1])
        kept = ~np.isnan(loss[part])
        if kept.sum() < 20:
            continue
        logs.append(
            Log(
                facts["workload"],
                loss[part][kept],
                norm[part][kept],
                facts["workload"] in SEEN,
            )
        )
    with np.load(directory / "nanogpt.npz") as stored:
        for number, name in enumerate(sorted(stored.files)):
            logs.append(Log("modded-nanogpt", stored[name], None, number % 2 == 0))
    return logs


def runs(logs: list[Log]) -> Runs:
    """Logs of one archive, shorter ones filled up at the end."""
    longest = max(len(log.loss) for log in logs)

    def filled(parts: list[np.ndarray], blank: float) -> np.ndarray:
        whole = [np.pad(x, (0, longest - len(x)), constant_values=blank) for x in parts]
        return np.stack(whole)

    norms = [log.norm for log in logs if log.norm is not None]
    given = np.arange(longest)[None] < np.array([len(log.loss) for log in logs])[:, None]
    loss = filled([log.loss for log in logs], 0.0)
    return examples.of_log(loss, filled(norms, 1.0) if norms else None, given)

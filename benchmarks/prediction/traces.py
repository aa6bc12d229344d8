"""Logs of real runs, from a directory of traces: which train the classifier and which judge it.

The two archives are those of AlgoPerf's submissions (`algoperf.npz`: loss and gradient norm, an
entry every hundred steps in most) and of modded-nanogpt's records (`nanogpt.npz`: a loss every
step). By workload, and of nanogpt by record, half of them train it, the other half judges it.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEEN = ("wmt", "imagenet_resnet", "librispeech_conformer_layernorm", "criteo1tb", "ogbg_gelu")
"""Workloads of AlgoPerf that train it."""
PIECE = 300
"""Logs are cut into pieces of so many entries to train on."""


class Log(NamedTuple):
    name: str
    loss: np.ndarray
    norm: np.ndarray | None
    seen: bool  # whether it trains the classifier
    every_step: bool  # an entry is a step


def read(directory: Path) -> list[Log]:
    """All logs of the two archives; entries without a loss are left out."""
    logs = []
    with np.load(directory / "algoperf.npz") as stored:
        offsets, meta = stored["offsets"], [json.loads(str(x)) for x in stored["meta"]]
        loss, norm, step = stored["loss"], stored["grad_norm"], stored["step"]
    for i, facts in enumerate(meta):
        part = slice(offsets[i], offsets[i + 1])
        kept = ~np.isnan(loss[part])
        if kept.sum() < 20:
            continue
        logs.append(
            Log(
                f"{facts['workload']}/{facts['submission']}/{i}",
                loss[part][kept],
                norm[part][kept],
                facts["workload"] in SEEN,
                bool(step[part][kept][-1] < 2 * kept.sum()),
            )
        )
    with np.load(directory / "nanogpt.npz") as stored:
        for number, name in enumerate(sorted(stored.files)):
            logs.append(Log(name, stored[name], None, number % 2 == 0, True))
    return logs

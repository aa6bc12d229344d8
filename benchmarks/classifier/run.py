"""Train the classifier, or judge it beside published rules: ``python -m benchmarks.classifier``.

``train --traces DIR`` makes runs, reads the half of the real logs that is for training, and writes
the weights into the package. ``judge --traces DIR`` makes runs of families and optimizers that the
classifier has never seen, reads the other half of the logs, and writes the result file of
docs/prediction.md. ``adapt --traces DIR`` judges the one that goes on learning in each run beside
the one that does not, on the same runs and logs. Runs that were made once are kept in
``runs/classifier``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.classifier import cost, examples, leaderboard, runs, tasks, traces, training
from benchmarks.classifier.leaderboard import Source, judged
from benchmarks.classifier.tables import ADAPTED, RESULTS
from benchmarks.command import refuse
from benchmarks.records import RUNS
from lbw_optax.law import classifier
from lbw_optax.law.control import LAW
from train import jsonl
from train.provenance import provenance

WEIGHTS = Path(classifier.__file__).with_suffix(".npz")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or judge."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.classifier", description="The classifier of the law."
    )
    parser.add_argument("what", choices=("train", "judge", "adapt"))
    parser.add_argument(
        "--traces",
        type=Path,
        required=True,
        help="directory with algoperf.npz and nanogpt.npz, logs of real runs",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    missing = [name for name in traces.FILES if not (options.traces / name).is_file()]
    if missing:
        refuse(f"{options.traces} holds no {' and no '.join(missing)}: pass the directory of both.")
    if options.what == "train":
        _train(options.traces, options.seed)
    elif options.what == "judge":
        _judge(options.traces)
    else:
        _adapt(options.traces)


def _train(directory: Path, seed: int) -> None:
    real = list(_real(directory, seen=True))
    weights = training.train([x.examples for x in (*_made("train"), *real)], seed)
    alarm = jnp.float32(leaderboard.alarm(real, weights))
    np.savez(WEIGHTS, allow_pickle=False, **weights._replace(alarm=alarm)._asdict())
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size} bytes")


def _judge(directory: Path) -> None:
    began = time.perf_counter()
    known = [*_made("valid"), *_real(directory, seen=True)]
    unseen = [*_made("unseen"), *_real(directory, seen=False)]
    found = judged(known, unseen, classifier.shipped())
    _write(RESULTS, found, began)


def _adapt(directory: Path) -> None:
    began = time.perf_counter()
    known = list(_real(directory, seen=True))
    unseen = [*_made("unseen"), *_real(directory, seen=False)]
    found = leaderboard.compared(known, unseen, classifier.shipped())
    _write(ADAPTED, {**found, "cost": cost.microseconds()}, began)


def _write(path: Path, found: dict[str, Any], began: float) -> None:
    facts = {"law": LAW, "seconds": round(time.perf_counter() - began, 1), **provenance()}
    result = {**facts, **found}
    path.write_text(json.dumps(jsonl.finite(result), indent=1, allow_nan=False) + "\n")
    print(f"{path}: run python -m benchmarks.pages for docs/prediction.md")


def _made(split: str) -> list[Source]:
    """The runs of a split, from `runs/classifier` where they are there."""
    folder = RUNS / "classifier"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for task in tasks.settings(split):
        path = folder / f"{task.name}.npz"
        told: dict[str, Any]
        if path.exists():
            with np.load(path) as stored:
                told = dict(stored)
        else:
            told = runs.run(task)
            np.savez_compressed(path, allow_pickle=False, **told)
            jax.clear_caches()
            print(f"{task.name}: {tasks.LANES} runs", flush=True)
        befell = tasks.lanes(task)
        of = examples.of_guard(told, befell)
        found.append(Source(task.family, False, of, examples.of(of), befell.fault))
    return found


def _real(directory: Path, *, seen: bool) -> list[Source]:
    """The logs that train it, or the others, those of about one length together."""
    groups: dict[tuple[str, int], list[traces.Log]] = {}
    for log in traces.read(directory):
        if log.seen == seen:
            groups.setdefault((log.workload, len(log.loss).bit_length()), []).append(log)
    found = []
    for (workload, _), logs in sorted(groups.items()):
        of = traces.runs(logs)
        faults = np.full(len(logs), "none")
        found.append(Source(workload, True, of, examples.of(of), faults))
    return found

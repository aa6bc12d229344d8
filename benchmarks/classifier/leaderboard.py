"""Every predictor on every run: what stands in docs/prediction.md, as plain numbers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.classifier import judging, tasks, training
from benchmarks.classifier.examples import Examples, Runs
from benchmarks.classifier.rules import RULES
from lbw_optax.law import adapting, classifier
from lbw_optax.law.classifier import HORIZONS, Kind, Risk, Weights

OURS = "classifier"
# How many runs go through the classifier at once.
ROWS = 64


class Source(NamedTuple):
    """Runs of one family, or logs of one workload."""

    name: str
    real: bool
    runs: Runs
    examples: Examples
    faults: np.ndarray  # str, what befell each run


class Said(NamedTuple):
    """What one predictor says of one source: float[runs, steps] for each horizon."""

    source: Source
    scores: tuple[np.ndarray, np.ndarray]


def judged(known: Sequence[Source], unseen: Sequence[Source], weights: Weights) -> dict[str, Any]:
    """All numbers of the page.

    Args:
      known: of which a predictor may know: thresholds are set on its healthy real logs.
      unseen: on which it is judged.
      weights: of the classifier.
    """
    told = {name: [say(source) for source in unseen] for name, say in _sayers(weights).items()}
    limits = {
        name: _limit([say(source) for source in known]) for name, say in _sayers(weights).items()
    }
    ours = told[OURS]
    return {
        "rate": judging.RATE,
        "sizes": {"known": _size(known), "unseen": _size(unseen)},
        "predictors": {name: _row(name, said, limits[name]) for name, said in told.items()},
        "families": {
            name: _part([x for x in ours if x.source.name == name], limits[OURS])
            for name in dict.fromkeys(source.name for source in unseen)
        },
        "faults": {
            fault: _part([_of_fault(x, fault) for x in ours if not x.source.real], limits[OURS])
            for fault in tasks.FAULTS
        },
        "calibration": {
            "made" if made else "real": [
                _calibration([x for x in ours if x.source.real != made], i)
                for i in range(len(HORIZONS))
            ]
            for made in (True, False)
        },
        "kinds": _kinds([x for x in unseen if not x.real], weights),
    }


def compared(known: Sequence[Source], unseen: Sequence[Source], weights: Weights) -> dict[str, Any]:
    """The classifier as it is shipped, and the one that goes on learning in each run.

    Each is judged at the threshold of its own and at that of the other one, which tells what
    learning changes from what another threshold does. The kinds are the same, for what they are
    read with does not learn.

    Args:
      known: real logs on which thresholds are set.
      unseen: on which both are judged.
      weights: of the classifier.
    """
    says = [functools.partial(_classifier, weights, adapts=adapts) for adapts in (False, True)]
    limits = [_limit([say(source) for source in known]) for say in says]
    rows = [
        _ours([say(source) for source in unseen], *thresholds)
        for say, thresholds in zip(says, (limits, limits[::-1]), strict=True)
    ]
    return {
        "rate": adapting.RATE,
        "radius": adapting.RADIUS,
        "sizes": {"known": _size(known), "unseen": _size(unseen)},
        "shipped": rows[0],
        "adapted": rows[1],
    }


def _ours(said: Sequence[Said], own: float, other: float) -> dict[str, Any]:
    parts = {
        kind: [x for x in said if x.source.real == real]
        for kind, real in (("made", False), ("real", True))
    }
    horizons = list(enumerate(HORIZONS))
    return {
        "matched": {kind: _judged(x, own) for kind, x in parts.items()},
        "other": {kind: _judged(x, other) for kind, x in parts.items()},
        "ranking": {
            kind: [judging.ranking(_pairs(x, i), horizon) for i, horizon in horizons]
            for kind, x in parts.items()
        },
        "calibration": {
            kind: [_calibration(x, i) for i, _ in horizons] for kind, x in parts.items()
        },
    }


def alarm(known: Sequence[Source], weights: Weights) -> float:
    """The classifier's threshold with `RATE` false alarms on the real logs of what is known."""
    return _limit([_classifier(weights, source) for source in known])


def _sayers(weights: Weights) -> dict[str, Callable[[Source], Said]]:
    def rule(name: str, source: Source) -> Said:
        score = RULES[name].score(source.runs, source.examples)
        return Said(source, (score, score))

    own = {OURS: functools.partial(_classifier, weights)}
    return own | {name: functools.partial(rule, name) for name in RULES}


def _classifier(weights: Weights, source: Source, *, adapts: bool = False) -> Said:
    risk = _risk(weights, source, adapts=adapts)
    return Said(source, (np.asarray(risk.soon), np.asarray(risk.later)))


def _risk(weights: Weights, source: Source, *, adapts: bool = False) -> Risk:
    """What the classifier says after each step, arrays of [runs, steps]."""

    @jax.jit
    @jax.vmap
    def go(inputs: jax.Array, excess: jax.Array, broken: jax.Array) -> Risk:
        def one(adapted: Any, now: tuple[jax.Array, ...]) -> tuple[Any, Risk]:
            cells, excess, broken = now
            adapted = classifier.adapt(adapted, weights, cells, excess, broken)
            return adapted, classifier.risk(weights, cells, broken, adapted)

        cells = training.cells(weights, inputs)
        first = classifier.init(adapts=adapts).adapted
        return jax.lax.scan(one, first, (cells, excess, broken))[1]

    given = source.examples.inputs, source.examples.excess, source.runs.seen["nonfinite_loss"] > 0
    parts = [
        jax.device_get(go(*(x[at : at + ROWS] for x in given)))
        for at in range(0, len(given[0]), ROWS)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _row(name: str, said: Sequence[Said], limit: float) -> dict[str, Any]:
    made = [x for x in said if not x.source.real]
    real = [x for x in said if x.source.real]
    published = RULES[name].threshold if name in RULES else None
    at = {"matched": limit} | ({"published": published} if published is not None else {})
    return {
        "title": RULES[name].title if name in RULES else "the classifier, within 10 steps",
        **{
            title: {kind: _judged(x, limit) for kind, x in (("made", made), ("real", real))}
            for title, limit in at.items()
        },
        "ranking": {
            kind: [judging.ranking(_pairs(x, i), horizon) for i, horizon in enumerate(HORIZONS)]
            for kind, x in (("made", made), ("real", real))
        },
    }


def _limit(said: Sequence[Said]) -> float:
    """The threshold with `RATE` false alarms on real logs; on made runs if it reads no log."""
    says = [x for x in said if not np.isnan(x.scores[0]).all()]
    if not says:
        return float("inf")
    return judging.judge(_first([x for x in says if x.source.real] or says)).threshold


def _part(said: Sequence[Said], limit: float) -> dict[str, Any]:
    return {
        "real": said[0].source.real,
        "runs": sum(len(x.source.runs.ends) for x in said),
        **_judged(said, limit),
        "auroc": [judging.ranking(_pairs(said, i), h)[0] for i, h in enumerate(HORIZONS)],
    }


def _judged(said: Sequence[Said], limit: float) -> dict[str, Any]:
    return judging.judge(_first(said), limit)._asdict()


def _first(said: Sequence[Said]) -> list[tuple[Runs, np.ndarray]]:
    return [(x.source.runs, x.scores[0]) for x in said]


def _pairs(said: Sequence[Said], horizon: int) -> list[tuple[Examples, np.ndarray]]:
    return [(x.source.examples, x.scores[horizon]) for x in said]


def _of_fault(said: Said, fault: str) -> Said:
    rows = said.source.faults == fault

    def cut(x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[rows], x)

    source = said.source._replace(
        runs=cut(said.source.runs), examples=cut(said.source.examples), faults=rows[rows]
    )
    return Said(source, cut(said.scores))


def _calibration(said: Sequence[Said], horizon: int) -> dict[str, Any]:
    error, rows = judging.calibration(_pairs(said, horizon), HORIZONS[horizon])
    return {"error": error, "bins": rows}


def _kinds(sources: Sequence[Source], weights: Weights) -> dict[str, Any]:
    """How often each kind is told, [true, said], among steps that stand out."""
    found = np.zeros((len(Kind), len(Kind)), int)
    for source in sources:
        told = np.asarray(_risk(weights, source).kinds).argmax(-1)
        true = source.examples.kind
        np.add.at(found, (true[true >= 0], told[true >= 0]), 1)
    two = found[:2, :2]
    share = [two[i, i] / max(two[i].sum(), 1) for i in range(2)]
    return {"counts": found.tolist(), "balanced": float(np.mean(share))}


def _size(sources: Sequence[Source]) -> dict[str, Any]:
    return {
        kind: {
            "runs": sum(len(x.runs.ends) for x in sources if x.real == real),
            "steps": sum(int(x.runs.given.sum()) for x in sources if x.real == real),
            "diverge": sum(int(x.runs.diverges.sum()) for x in sources if x.real == real),
        }
        for kind, real in (("made", False), ("real", True))
    }

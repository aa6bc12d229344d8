"""Perplexity on the held-out splits of a run: in parts while it trains, and at its end."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from train import loop
from train.interrupt import Interrupt, Stopped
from train.losses import IGNORED
from train.options import Options
from train.watch import Watch

Windows = Mapping[str, np.ndarray]
"""By split, as `train.data.windows` cuts them: int32 (batches, batch size, length + 1)."""


class Evaluation(NamedTuple):
    """Measures, shows and logs, until the run is asked to stop."""

    loss_fn: loop.LossFn
    frozen: Any
    held_out: Windows
    options: Options
    watch: Watch
    interrupted: Interrupt

    def during(self, params: Any) -> None:
        """Measure a part of the valid split."""
        with contextlib.suppress(Stopped):
            self._measure("valid", params, part(self.held_out["valid"], self.options.eval_targets))

    def at_the_end(self, params: Any) -> dict[str, float]:
        """The perplexity of each split; empty if the run is asked to stop meanwhile."""
        try:
            return {
                split: self._measure(split, params, self.final(split)) for split in self.held_out
            }
        except Stopped:
            return {}

    def final(self, split: str) -> np.ndarray:
        """The windows that are measured at the end."""
        return part(self.held_out[split], self.options.final_eval_targets)

    def _measure(self, split: str, params: Any, windows: np.ndarray) -> float:
        shown = self.watch.batches(f"{split} split", windows)
        perplexity = loop.perplexity(
            self.loss_fn, params, self._until_asked(shown), frozen=self.frozen
        )
        self.watch.evaluated(f"{split}_perplexity", perplexity)
        return perplexity

    def _until_asked(self, windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for tokens in windows:
            if self.interrupted:
                raise Stopped
            yield tokens


def size(held_out: Windows, options: Options) -> int:
    """Tokens that a whole run predicts in its evaluations, padding included."""
    times = (options.steps - 1) // options.eval_every if options.eval_every else 0
    during = part(held_out["valid"], options.eval_targets)
    final = [part(windows, options.final_eval_targets) for windows in held_out.values()]
    return times * during[..., 1:].size + sum(windows[..., 1:].size for windows in final)


def part(windows: np.ndarray, limit: int | None) -> np.ndarray:
    """At most so many targets, in whole batches, and at least one batch; None: all.

    >>> windows = np.zeros((10, 2, 5))  # two rows of four targets a batch
    >>> len(part(windows, 33)), len(part(windows, 1)), len(part(windows, None))
    (4, 1, 10)
    """
    per_batch = windows.shape[1] * (windows.shape[2] - 1)
    return windows if limit is None else windows[: max(limit // per_batch, 1)]


def targets(windows: np.ndarray) -> int:
    """How many tokens are predicted in these windows."""
    return int(np.count_nonzero(windows[..., 1:] != IGNORED))

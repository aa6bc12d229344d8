"""Live progress over several runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, Self

from tqdm import tqdm

from lbw_optax import REGIMES


class Progress:
    """Shows run, step, loss, scale, regime and the time left until `total` steps are done.

    Everything goes to standard error; a line every `every` seconds when that is no terminal.
    """

    def __init__(self, total: int, *, every: float = 5.0):
        self._every = every
        self._started = self._shown = time.monotonic()
        self._run, self._steps = "", 0
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=not live, dynamic_ncols=True, bar_format=_BAR)
        self._done, self._total = 0, total

    def start(self, run: str, steps: int) -> None:
        """Name the run that the next steps belong to, and its length."""
        self._run, self._steps = run, steps
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description_str(run)

    def move(self, steps: int) -> None:
        """Go on from another place: steps that an earlier process made, or that are undone."""
        self._total -= steps  # of this process's own
        if not self._bar.disable:
            self._bar.initial += steps
            self._bar.update(steps)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Count one step, with the metrics that `train.loop.fit` gives for it."""
        self._done += 1
        self._bar.set_postfix_str(describe(metrics), refresh=False)
        self._bar.update()
        if self._done == 1:  # it was compiled: its time says nothing about the others
            self._started = time.monotonic()
        elif self._bar.disable and time.monotonic() - self._shown > self._every:
            place = f"{self._run}  step {step + 1}/{self._steps}"
            self.note(f"{place}  {describe(metrics)}  {self._left()} left")

    def batches(self, name: str, batches: Collection[Any]) -> Iterator[Any]:
        """Give these one by one, with a bar of their own: an evaluation between two steps."""
        bar = tqdm(total=len(batches), desc=name, leave=False, disable=self._bar.disable)
        with bar:
            for done, batch in enumerate(batches, start=1):
                yield batch
                bar.update()
                if bar.disable and time.monotonic() - self._shown > self._every:
                    self.note(f"{self._run}  {name}: batch {done}/{len(batches)}")

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self._shown = time.monotonic()
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def _left(self) -> str:
        rate = (time.monotonic() - self._started) / (self._done - 1)
        return tqdm.format_interval(rate * (self._total - self._done))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def describe(metrics: dict[str, Any]) -> str:
    """Loss, the guard's scale and regime, and the speed: what there is of them.

    >>> describe({"loss": 3.2061, "scale": 0.05, "regime": 0})
    'loss 3.206  scale 0.050  nominal'
    >>> describe({"loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.412})
    'loss 2.500  12,346 tokens/s  MFU 41.2 %'
    """
    parts = [f"loss {metrics['loss']:.3f}"]
    if "scale" in metrics:
        parts += [f"scale {metrics['scale']:.3f}", REGIMES[int(metrics["regime"])]]
    if "mfu" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"MFU {100 * metrics['mfu']:.1f} %")
    return "  ".join(parts)


_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"

"""What the guard did, told at once to a function of yours: to page somebody. Runs on the host."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_LOG = logging.getLogger("lbw_optax")


class Alert(NamedTuple):
    """Something that the guard did, or asks for.

    Attributes:
      level: "info", "warning" or "error"; an error is a run that is about to stop.
      sentence: what happened, for a person.
      step: of the loop, when it was read.
      line: the line of the audit log, as JSON has it: numbers, words, None.
    """

    level: str
    sentence: str
    step: int
    line: dict[str, Any]


Listener = Callable[[Alert], object]
OnEvent = Listener | Iterable[Listener]
"""A function of an `Alert`, or several."""


class Listeners:
    """Functions that are told. One that fails is named in the log, once, and harms nothing."""

    def __init__(self, on_event: OnEvent):
        self._all = (on_event,) if callable(on_event) else tuple(on_event)
        for listener in self._all:
            if not callable(listener):
                raise TypeError(
                    f"on_event must be a function of an Alert, or several, got {listener!r}."
                )
        self._failed: set[int] = set()

    def tell(self, level: int, sentence: str, step: int, line: dict[str, Any]) -> None:
        """Say it to the logger, and to each of them.

        Args:
          level: of the `logging` module.
          sentence: for a person.
          step: of the loop.
          line: what a program may want to know.
        """
        _LOG.log(level, sentence)
        alert = Alert(logging.getLevelName(level).lower(), sentence, step, line)
        for i, listener in enumerate(self._all):
            try:
                listener(alert)
            except Exception as error:
                if i not in self._failed:
                    self._failed.add(i)
                    _LOG.warning(
                        "on_event: %r failed (%s: %s). Training goes on, and it is told of what "
                        "comes; should it fail again, nothing is said.",
                        listener,
                        type(error).__name__,
                        error,
                    )

"""What the guard did, told at once to a function of yours: to page somebody. Runs on the host."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, ParamSpec

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


Told = ParamSpec("Told")
OnEvent = Callable[[Alert], object] | Iterable[Callable[[Alert], object]]
"""A function of an `Alert`, or several."""


class Listeners(Generic[Told]):
    """Functions of the user. One that fails is named in the log, once, and harms nothing.

    Args:
      name: of the argument that they were given as.
      given: a function, or several.

    Raises:
      TypeError: if one is no function.
    """

    def __init__(self, name: str, given: Callable[Told, object] | Iterable[Callable[Told, object]]):
        self._name = name
        self._all = (given,) if callable(given) else tuple(given)
        for listener in self._all:
            if not callable(listener):
                raise TypeError(f"{name} must be a function, or several, got {listener!r}.")
        self._failed: set[int] = set()

    def __call__(self, *args: Told.args, **kwargs: Told.kwargs) -> None:
        """Call each of them."""
        for i, listener in enumerate(self._all):
            try:
                listener(*args, **kwargs)
            except Exception as error:
                if i not in self._failed:
                    self._failed.add(i)
                    _LOG.warning(
                        "%s: %r failed (%s: %s). Training goes on, and it is called again with "
                        "what comes; should it fail again, nothing is said.",
                        self._name,
                        listener,
                        type(error).__name__,
                        error,
                    )


def tell(
    listeners: Listeners[[Alert]], level: int, sentence: str, step: int, line: dict[str, Any]
) -> None:
    """Say it to the logger, and to each of the functions.

    Args:
      listeners: the functions.
      level: of the `logging` module.
      sentence: for a person.
      step: of the loop.
      line: what a program may want to know.
    """
    _LOG.log(level, sentence)
    listeners(Alert(logging.getLevelName(level).lower(), sentence, step, line))

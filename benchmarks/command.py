"""What the commands of the benchmarks share: names that are checked, and one way to refuse."""

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Leave with one sentence and status 2 when a name is unknown."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            if near:
                refuse(f"There is no {what} {name!r}: did you mean {' or '.join(near)}?")
            refuse(f"There is no {what} {name!r}: choose from {', '.join(known)}.")


def refuse(sentence: str) -> NoReturn:
    """Leave with status 2."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)

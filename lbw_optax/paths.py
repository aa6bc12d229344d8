"""Where a user says that something is."""

from pathlib import Path
from typing import Any


def path_of(given: Any, name: str) -> Path:
    """The path that an argument of this name gives.

    Raises:
      TypeError: if it is none.

    >>> path_of("runs/mine", "directory").name
    'mine'
    """
    try:
        return Path(given)
    except TypeError:
        raise TypeError(f"{name} must be a path, a str or a pathlib.Path, got {given!r}.") from None

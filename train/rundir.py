"""A run directory: made for one set of options, and used again only for the same ones."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from train.options import Options, as_json

FREE = ("out", "track", "eval_every", "eval_targets")
"""Options that may differ when a run goes on: they change nothing about its steps."""


def check(options: Options) -> None:
    """See whether the run directory, if there is one, holds this run.

    Raises:
      ValueError: if a run with other options lives there (all differences are listed).
    """
    path = options.out / "config.json"
    if path.exists() and (differences := _differences(_read(path), as_json(options))):
        raise ValueError(
            f"{options.out} holds a run with other options ({'; '.join(differences)}): give those "
            "to go on with it, or another --out"
        )


def claim(options: Options, needed_bytes: int) -> None:
    """Make the run directory and write ``config.json``, or check the one that is there.

    Args:
      options: of the run.
      needed_bytes: what the run will write there at least.

    Raises:
      ValueError: as `check`, if there is too little room, or if nothing can be written.
    """
    check(options)
    try:
        _claim(options, needed_bytes)
    except OSError as error:
        raise ValueError(
            f"{options.out} cannot be written ({error.strerror}): choose another --out"
        ) from error


def _claim(options: Options, needed_bytes: int) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.out).free
    if free < needed_bytes:
        raise ValueError(
            f"{options.out} has room for {free / 1e9:.3g} GB, and the checkpoints of this run need "
            f"{needed_bytes / 1e9:.3g} GB: choose another --out, or make room"
        )
    if not (options.out / "config.json").exists():
        write_json(options.out / "config.json", as_json(options))


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{path} is not the config.json of a run ({error}): choose another --out"
        ) from error


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {there.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(there.keys() | wanted.keys())
        if name not in FREE and there.get(name) != wanted.get(name)
    ]

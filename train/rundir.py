"""A run directory: made for one set of options, and used again only for the same run."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from train import recipes
from train.options import Options, as_json

FREE = (
    "out",
    "track",
    "save_every",
    "max_distance",
    "eval_every",
    "eval_targets",
    "final_eval_targets",
    "microbatches",
    "remat",
    "loss_chunk",
    "prometheus",
)
"""Options that may differ when a run goes on: they change rounding, cadence or what is seen."""


def check(options: Options) -> list[str]:
    """See whether the run directory can be written, and what in it is other than these options.

    Returns:
      What changes in the run that goes on here, a phrase each; empty for a new run.

    Raises:
      ValueError: if another run lives there (all differences are listed), or if nothing can be
        written there.
    """
    try:
        _try(options.out)
    except OSError as error:
        raise _unwritable(options.out, error) from error
    path = options.out / "config.json"
    if not path.exists():
        return []
    there, wanted = _defaults(options) | read(path), as_json(options)
    names = [name for name in sorted(there.keys() | wanted.keys()) if name != "out"]
    changed = [name for name in names if there.get(name) != wanted.get(name)]
    free = [name for name in changed if _is_free(name, there, options)]
    if fixed := [name for name in changed if name not in free]:
        listed = "; ".join(
            f"{name} is {there.get(name)!r} there and {wanted.get(name)!r} here" for name in fixed
        )
        why = "; --steps can grow only at a constant rate" if "steps" in fixed else ""
        raise ValueError(
            f"{options.out} holds a run with other options ({listed}{why}): give those "
            "to go on with it, or another --out"
        )
    return [f"{name} is {wanted.get(name)!r}, was {there.get(name)!r}" for name in free]


def claim(options: Options, needed_bytes: int) -> None:
    """Make the run directory and write ``config.json``, with the options that may change.

    Args:
      options: of the run.
      needed_bytes: what the run will write there at least.

    Raises:
      ValueError: as `check`, or if there is too little room.
    """
    changed = check(options)
    try:
        _claim(options, needed_bytes, changed)
    except OSError as error:
        raise _unwritable(options.out, error) from error


def _claim(options: Options, needed_bytes: int, changed: list[str]) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.out).free
    if free < needed_bytes:
        raise ValueError(
            f"{options.out} has room for {free / 1e9:.3g} GB, and the checkpoints of this run need "
            f"{needed_bytes / 1e9:.3g} GB: choose another --out, or make room"
        )
    if changed or not (options.out / "config.json").exists():
        write_json(options.out / "config.json", as_json(options))


def finished(options: Options, product: str) -> bool:
    """Whether this run has ended: it has its result, for so many steps, and its `product`."""
    try:
        result = read(options.out / "result.json")
        steps = result["options"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return steps == options.steps and (options.out / product).is_dir()


def has_checkpoints(out: Path) -> bool:
    """Whether a run goes on in this directory, rather than begins."""
    return bool(_checkpoints(out))


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read(path: Path) -> dict[str, Any]:
    """A JSON file of a run directory.

    Raises:
      ValueError: if it is none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not the {path.name} of a run ({error}): choose another --out"
        ) from error


def _try(out: Path) -> None:
    """Write into the directory, or into the nearest one above it that there is."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    tempfile.TemporaryDirectory(dir=place).cleanup()


def _unwritable(out: Path, error: OSError) -> ValueError:
    return ValueError(f"{out} cannot be written ({error.strerror}): choose another --out")


def _defaults(options: Options) -> dict[str, Any]:
    """For the options that there were not yet when a run was begun."""
    known = {f.name: f.default for f in dataclasses.fields(options) if f.name in as_json(options)}
    given = {name: x for name, x in known.items() if x is not dataclasses.MISSING}
    return json.loads(json.dumps(given, default=str))


def _is_free(name: str, there: dict[str, Any], options: Options) -> bool:
    return name in FREE or (name == "steps" and _only_goes_on_longer(there, options))


def _only_goes_on_longer(there: dict[str, Any], options: Options) -> bool:
    """More steps at a constant rate: those that were made, and the rates to come, stay the same."""
    before = there.get("steps")
    if not isinstance(before, int) or options.schedule != "constant" or options.steps < before:
        return False
    warmups = {recipes.warmup_steps(options.warmup, steps) for steps in (before, options.steps)}
    return len(warmups) == 1 or max(warmups) <= max(_checkpoints(options.out), default=0)


def _checkpoints(out: Path) -> list[int]:
    """Their steps, as the journal names them."""
    try:
        return [int(step) for step in read(out / "journal.json")["checkpoints"]]
    except (OSError, ValueError, KeyError):
        return []

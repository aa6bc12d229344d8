"""A JSON Lines file that runs append to and continue from."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbw_optax.lines import is_torn


def append(path: Path, *records: dict[str, Any]) -> dict[str, Any]:
    """Write a line a record, whole, in one call, and give the last record as `read` will.

    Several processes may append to one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(finite(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for record in records
    ]
    with path.open("ab+") as file:
        whole = b"".join(line.encode() + b"\n" for line in lines)
        file.write(b"\n" * is_torn(file) + whole)
    return json.loads(lines[-1])


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; what a killed process left of its last line is no record.

    Not-a-number and infinity come back as None.
    """
    return [record for _, record in numbered(path)]


def numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read` gives them, each with the number of its line, from 1."""
    content = path.read_bytes() if path.exists() else b""
    # Only the byte that `append` ends a line with: a string may hold what Unicode ends lines with.
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            record = json.loads(line.decode(errors="replace"))
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield number, record


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: both become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All columns set to the left."""
    return _table([head, ["---"] * len(head), *rows])


def numbers(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All columns but the first set to the right.

    >>> print(numbers(["", "loss"], [["AdamW", "4.03"]]))
    |  | loss |
    | --- | ---: |
    | AdamW | 4.03 |
    """
    return _table([head, ["---", *["---:"] * (len(head) - 1)], *rows])


def _table(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

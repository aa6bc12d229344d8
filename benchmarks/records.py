"""What a record of a result file says of its run, and which records make a table.

A cell is one run, as a dict of the facts that tell it from others: its method, rate, seed, ... Its
record has these facts too. They are compared one by one, so that a record is recognised whichever
commit, machine or hand has written it. The record of a guarded method states the version of the
law, `lbw_optax.law.control.LAW`, as the fact `law`; that of any other method has None there.

A name in a record stands for what the code has under it: whoever changes the constants of a method,
a regime or a fault gives it another name, or deletes its records.
"""

from collections.abc import Iterable
from typing import Any

from lbw_optax.law.control import LAW

Cell = dict[str, Any]
Record = dict[str, Any]


def law(guarded: bool) -> str | None:
    """What a record states as its law."""
    return LAW if guarded else None


def one_law(records: Iterable[Record]) -> list[Record]:
    """Of guarded records only those of one law: today's, or else the newest that is there.

    >>> one_law([{"law": "A"}, {"law": None}, {"law": "B"}])
    [{'law': None}, {'law': 'B'}]
    >>> one_law([{"law": LAW}, {"law": "a prototype"}]) == [{"law": LAW}]
    True
    """
    records = list(records)
    laws = [law for record in records if (law := record.get("law")) is not None]
    shown = LAW if LAW in laws else laws[-1] if laws else None
    return [record for record in records if record.get("law") in (None, shown)]

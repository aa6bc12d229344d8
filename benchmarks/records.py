"""Result files: what a record says of its run, where it says it, and which records make a table.

A result file is JSON Lines, appended to as runs end. What many records share (data, model, commit,
machine, ...) stands once, in a line of its own before the first of them, under a number:

    {"setting": 1, "facts": {"tokens": "1c4b084510f9a219", "commit": "f75922d1", ...}}
    {"setting": 1, "method": "adamw", "seed": 0, "law": null, "loss": 4.03}

A record may as well state its facts itself, and name no setting.

A cell is one run, as a dict of the facts that tell it from others: its method, rate, seed, ... Its
record has these facts too. They are compared one by one, so that a record is recognised whichever
commit, machine or hand has written it. The record of a guarded method states the version of the
law, `lbw_optax.law.control.LAW`, as the fact `law`; that of any other method has None there.

A name in a record stands for what the code has under it: whoever changes the constants of a method,
a regime or a fault gives it another name, or deletes its records.
"""

import fcntl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.command import refuse
from lbw_optax.law.control import LAW
from train import jsonl
from train.provenance import machines

FOLDER = Path(__file__).resolve().parent / "results"
"""Of the result files in git."""
RUNS = FOLDER.parent.parent / "runs"
"""Of what is made on the way, and of the result files of quick runs: nothing of it is in git."""

Cell = dict[str, Any]
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All records, each with the facts of its setting.

    Raises:
      SystemExit: with one sentence, for a record that names a setting that no line before it
        states, and for one that names none and says not itself what data it is of.
    """
    settings: dict[int, Record] = {}
    records = []
    for at, line in jsonl.numbered(path):
        number = line.pop("setting", None)
        if "facts" in line and number is not None:
            settings[number] = line["facts"]
            continue
        if number is not None and number not in settings:
            refuse(f"{path}, line {at}: no line before it states its setting {number}")
        if number is None and "data" not in line:
            refuse(f"{path}, line {at}: no record of a benchmark, for it states no data")
        records.append({**settings.get(number, {}), **line})
    return records


def append(path: Path, record: Record, facts: Record) -> Record:
    """Write a record, after its setting where that is new, and give it as `read` will.

    Several processes may append to one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two processes must not give two settings one number
        lines = jsonl.read(path)
        stated = {x["setting"]: x["facts"] for x in lines if x.keys() >= {"setting", "facts"}}
        new = max(stated, default=0) + 1
        number = next((n for n, known in stated.items() if known == facts), new)
        first = [{"setting": new, "facts": facts}] if number == new else []
        line = jsonl.append(path, *first, {"setting": number, **record})
    line.pop("setting")
    return {**facts, **line}


def quick(results: Path) -> Path:
    """Where the records of a ``--quick`` run go: they are no measurement."""
    return RUNS / "quick" / results.name


def out_help(results: Path) -> str:
    """What ``--help`` says of ``--out``, where it may be left out."""
    root = RUNS.parent
    here, there = results.relative_to(root), quick(results).relative_to(root)
    return f"result file, JSON Lines (default: {here}; with --quick {there}, which is not in git)"


def law(guarded: bool) -> str | None:
    """What a record states as its law."""
    return LAW if guarded else None


def one_law(records: Iterable[Record]) -> list[Record]:
    """Of guarded records only those of one law: that of the most runs of the guard itself.

    Of equally many the newest. So a table changes at once, when the last run of a new law is in.

    >>> one_law([{"law": "A"}, {"law": None}, {"law": "B"}])
    [{'law': None}, {'law': 'B'}]
    >>> one_law([{"law": "A"}, {"law": "A"}, {"law": "B"}])
    [{'law': 'A'}, {'law': 'A'}]
    """
    records = list(records)
    guarded = [record for record in records if record.get("law") is not None]
    own = [record["law"] for record in guarded if record.get("method", "guard") == "guard"]
    laws = own or [record["law"] for record in guarded]
    newest_first = dict.fromkeys(reversed(laws))
    shown = max(newest_first, key=laws.count, default=None)
    return [record for record in records if record.get("law") in (None, shown)]


def law_named(records: Iterable[Record]) -> str:
    """The law, to be said after the commits; nothing of records that state none.

    >>> law_named([{"law": "G"}, {"law": None}, {}, {"law": "I"}]), law_named([{}])
    ('; law G, I', '')
    """
    laws = sorted({record["law"] for record in records if record.get("law")})
    return f"; law {', '.join(laws)}" if laws else ""


def made_with(records: Iterable[Record], newest: Record) -> str:
    """Versions, as the newest record has them, and the machines of all."""
    versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
    return f"{versions}; {machines(records)}"

"""Where text comes from on this machine: Python's own source, or a directory. See `train.hub`."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SPLITS = ("train", "valid", "test")

Texts = Mapping[str, Iterable[str]]
"""Documents by split; each can be read more than once."""


class DataError(ValueError):
    """Text that cannot be used; the message says which and what to do."""


STANDARD_LIBRARY_BYTES = 6_000_000
"""The embedded corpus is cut here, so that the first run tokenises it in a few seconds."""

_SOMETIMES_ABSENT = {"ensurepip", "idlelib", "lib2to3", "test", "tests", "turtledemo"}
_NOT_PYTHON = {"__pycache__", "dist-packages", "site-packages", "sitecustomize.py"}
_TABLES = {"encodings", "pydoc_data"}
_LEFT_OUT = _SOMETIMES_ABSENT | _NOT_PYTHON | _TABLES


def standard_library() -> dict[str, list[str]]:
    """The embedded corpus: Python's own source files in a fixed order, whole files held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _LEFT_OUT & set(name.parts)]
    # `_sysconfigdata...` describes the machine, and lies in `config-...` too.
    names = [name for name in names if "config-" not in str(name) and "_sysconfig" not in name.name]
    # Ordered by hash, so that the cap and the held-out files are spread over all packages.
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    texts = list(_until(STANDARD_LIBRARY_BYTES, (_source(root / name) for name in names)))
    if len(texts) < 100:
        raise DataError(
            f"only {len(texts)} source files of Python's standard library lie in {root}: "
            "this Python ships without them; give a directory of text files"
        )
    return _hold_out(texts, every=10)


def text_directory(directory: Path, encoding: str = "utf-8") -> dict[str, list[str]]:
    """Read ``train.txt``, ``valid.txt``, ``test.txt``, or hold out some of all ``*.txt`` files.

    Raises `DataError` for files that are missing, or that are not in this encoding.
    """
    if not directory.is_dir():
        raise DataError(f"there is no directory {directory}: give one that holds *.txt files")
    named = {split: directory / f"{split}.txt" for split in SPLITS}
    if missing := [path.name for path in named.values() if not path.is_file()]:
        files = sorted(path for path in directory.rglob("*.txt") if path.is_file())
        if len(missing) < len(SPLITS):
            raise DataError(f"{directory} lacks {' and '.join(missing)}: give all three splits")
        if len(files) < 3:
            raise DataError(
                f"{directory} holds {len(files)} *.txt files: give train.txt, valid.txt and "
                "test.txt, or at least three files, so that some can be held out"
            )
        return _hold_out([_read(path, encoding) for path in files], every=min(10, len(files)))
    return {split: [_read(path, encoding)] for split, path in named.items()}


def _hold_out(texts: list[str], every: int) -> dict[str, list[str]]:
    """Of every so many files, give the last to test and the one before it to valid."""
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    held = {"valid": distinct[every - 2 :: every], "test": distinct[every - 1 :: every]}
    train = [text for i, text in enumerate(distinct) if i % every < every - 2]
    return {"train": train, **held}


def _until(limit: int, texts: Iterable[str]) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text)
        if total > limit:
            return
        yield text


def _source(path: Path) -> str:
    """A file of Python's own; the few bytes that are not UTF-8 stand in strings and comments."""
    return _opened(path, "utf-8", errors="replace")


def _read(path: Path, encoding: str) -> str:
    """The text, without the mark that some editors put before it."""
    try:
        return _opened(path, encoding, errors="strict").removeprefix("\ufeff")
    except UnicodeError as error:
        where = ""
        if isinstance(error, UnicodeDecodeError):
            where = f" (byte {error.start} is 0x{error.object[error.start]:02x})"
        raise DataError(
            f"{path} is not {encoding}{where}: give its --encoding, latin-1 say, or convert it"
        ) from error


def _opened(path: Path, encoding: str, errors: str) -> str:
    try:
        return path.read_text(encoding=encoding, errors=errors)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error

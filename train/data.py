"""Text to batches: a corpus with held-out files, byte-level BPE, and a sampler without state."""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train.model import IGNORED

SPLITS = ("train", "valid", "test")
END = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-text token."""


class DataError(ValueError):
    """Text that cannot be used; the message says which and what to do."""


class Corpus(NamedTuple):
    """Token ids of the three splits, each a flat int32 array, and the tokenizer behind them."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    tokenizer: Tokenizer


def load(directory: str | Path | None = None, *, vocab_size: int) -> Corpus:
    """Read a corpus, train a byte-level BPE on its train split, and tokenise it, once.

    Without `directory` the corpus is the source of Python's own standard library. A directory
    holds either ``train.txt``, ``valid.txt`` and ``test.txt``, or any three or more ``*.txt``
    files, of which whole files are held out. Tokens are kept in ``$LBW_CACHE`` (default
    ``~/.cache/lbw_optax``) under a hash of the text. Raises `DataError`.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size={vocab_size}: byte-level BPE needs {SMALLEST_VOCABULARY}")
    texts = standard_library() if directory is None else text_directory(Path(directory))
    for split in SPLITS:
        if not any(texts[split]):
            raise DataError(f"the {split} split of {directory or 'the corpus'} holds no text")
    entry = _cache_directory() / _fingerprint(texts, vocab_size)
    if not entry.is_dir():
        _tokenise(texts, vocab_size, entry)
    train, valid, test = (np.load(entry / f"{split}.npy", mmap_mode="r") for split in SPLITS)
    return Corpus(train, valid, test, Tokenizer.from_file(str(entry / "tokenizer.json")))


def sample(tokens: np.ndarray, seed: int, step: int, *, batch_size: int, length: int) -> np.ndarray:
    """Draw random windows, int32 of shape (batch_size, length + 1): a pure function of its input.

    The generator is keyed by (seed, step) and carries nothing from step to step, so a run that
    is resumed or rolled back sees exactly the batches of the run that was not.

    >>> tokens = np.arange(100, dtype=np.int32)
    >>> sample(tokens, seed=0, step=3, batch_size=2, length=3)
    array([[48, 49, 50, 51],
           [86, 87, 88, 89]], dtype=int32)
    """
    if len(tokens) <= length:
        raise DataError(
            f"{len(tokens)} tokens are too few for one sequence of {length}: "
            "give more text or a shorter sequence"
        )
    starts = np.random.default_rng([seed, step]).integers(len(tokens) - length, size=batch_size)
    return np.asarray(tokens[starts[:, None] + np.arange(length + 1)], np.int32)


def windows(
    tokens: np.ndarray, *, batch_size: int, length: int, limit: int | None = None
) -> np.ndarray:
    """Cut tokens into evaluation batches, int32 of shape (batches, batch_size, length + 1).

    Windows do not overlap in their targets, so each token but the first is predicted once, from
    at most `length` tokens before it. The end is padded with `IGNORED`. `limit` takes only the
    first so many targets.

    >>> windows(np.arange(6), batch_size=2, length=3).tolist()
    [[[0, 1, 2, 3], [3, 4, 5, -1]]]
    """
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens hold no target to predict: give more text")
    targets = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
    rows = -(-targets // length)
    batches = -(-rows // batch_size)
    positions = np.arange(batches * batch_size)[:, None] * length + np.arange(length + 1)
    inside = positions <= targets
    cut = np.where(inside, tokens[np.where(inside, positions, 0)], IGNORED)
    return cut.reshape(batches, batch_size, length + 1).astype(np.int32)


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
    texts = list(_until(STANDARD_LIBRARY_BYTES, (_read(root / name) for name in names)))
    if len(texts) < 100:
        raise DataError(
            f"only {len(texts)} source files of Python's standard library lie in {root}: "
            "this Python ships without them; give a directory of text files"
        )
    return _hold_out(texts, every=10)


def text_directory(directory: Path) -> dict[str, list[str]]:
    """Read ``train.txt``, ``valid.txt``, ``test.txt``, or hold out some of all ``*.txt`` files."""
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
        return _hold_out([_read(path) for path in files], every=min(10, len(files)))
    return {split: [_read(path)] for split, path in named.items()}


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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _fingerprint(texts: dict[str, list[str]], vocab_size: int) -> str:
    """A hash of all that decides the tokens, so that a cache entry is never stale."""
    digest = hashlib.sha256(f"1 {vocab_size} {tokenizers.__version__}".encode())
    for split in SPLITS:
        for text in texts[split]:
            digest.update(f"\0{split} {len(text)}\0".encode() + text.encode())
    return digest.hexdigest()[:32]


def _cache_directory() -> Path:
    directory = Path(os.environ.get("LBW_CACHE") or Path.home() / ".cache" / "lbw_optax")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the cache directory {directory} ({error.strerror}): "
            "set LBW_CACHE to a place that can be written"
        ) from error
    return directory


def _tokenise(texts: dict[str, list[str]], vocab_size: int, entry: Path) -> None:
    """Write tokenizer and tokens to `entry`, which appears whole or not at all.

    Two processes may do this at once: both write the same bytes, and the second to finish keeps
    the entry of the first.
    """
    try:
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=entry.parent))
    except OSError as error:
        raise DataError(
            f"cannot write to the cache directory {entry.parent} ({error.strerror}): "
            "set LBW_CACHE to a place that can be written"
        ) from error
    try:
        tokenizer = train_tokenizer(texts["train"], vocab_size)
        tokenizer.save(str(draft / "tokenizer.json"))
        for split in SPLITS:
            np.save(draft / f"{split}.npy", encode(tokenizer, texts[split]))
        try:
            draft.rename(entry)
        except OSError:
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's pre-tokenisation); id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids of all texts, an end-of-text token after each: one flat int32 array."""
    end = np.array([tokenizer.token_to_id(END)], np.int32)
    pieces = []
    for text in texts:
        encodings = tokenizer.encode_batch(list(_chunks(text)))
        pieces += [np.array(encoding.ids, np.int32) for encoding in encodings]
        pieces.append(end)
    return np.concatenate(pieces)


def _chunks(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Runs of whole lines: the tokenizer takes them in parallel, and never one huge string."""
    lines, length = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)

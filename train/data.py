"""Text to batches: tokens that are made once, byte-level BPE, and a sampler without state."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train import hub
from train.corpora import SPLITS, DataError, Texts, standard_library, text_directory
from train.losses import IGNORED

END = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-text token."""


class Corpus(NamedTuple):
    """Token ids of the three splits, each a flat int32 array, and the tokenizer behind them.

    A document ends with the token `end`.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    tokenizer: Tokenizer
    end: int = 0


def load(
    source: str | Path | None = None,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    encoding: str = "utf-8",
) -> Corpus:
    """Read a corpus and tokenise it, once: later calls map the tokens from a file.

    Tokens are kept in ``$LBW_CACHE`` (default ``~/.cache/lbw_optax``) under a hash of the text
    and the tokenizer.

    Args:
      source: None or "standard-library" is the source of Python's own standard library;
        "wikitext-2", "wikitext-103" and any "owner/name" or "owner/name:configuration" come from
        the Hugging Face hub (`train.hub`). A directory holds either ``train.txt``, ``valid.txt``
        and ``test.txt``, or three or more ``*.txt`` files, of which whole files are held out, or
        the files of a data set of the hub. A ``*.txt`` file is one document.
      vocab_size: of the byte-level BPE that is trained on the train split.
      tokenizer: instead, directory or hub name of a model whose tokenizer is used.
      encoding: of the ``*.txt`` files.

    Raises:
      DataError: if there is no such text, or too little of it.
    """
    if vocab_size is not None and vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size={vocab_size}: byte-level BPE needs {SMALLEST_VOCABULARY}")
    if (vocab_size is None) == (tokenizer is None):
        raise DataError("give either vocab_size, to train a tokenizer, or tokenizer")
    texts, key = _texts(source, encoding)
    for split in SPLITS:
        if not any(text.strip() for text in texts[split]):
            raise DataError(f"the {split} split of {source or 'the corpus'} holds no text")
    ready = None if tokenizer is None else hub.tokenizer(tokenizer)
    entry = _cache_directory() / _fingerprint(texts, key, vocab_size, ready)
    if not entry.is_dir():
        _tokenise(texts, vocab_size, ready, entry)
    train, valid, test = (np.load(entry / f"{split}.npy", mmap_mode="r") for split in SPLITS)
    if ready is not None:
        return Corpus(train, valid, test, *ready)
    return Corpus(train, valid, test, Tokenizer.from_file(str(entry / "tokenizer.json")))


def _texts(source: str | Path | None, encoding: str) -> tuple[Texts, str | None]:
    """The three splits, and a key that stands for their text where reading it all is too much."""
    if source is None or source == "standard-library":
        return standard_library(), None
    if isinstance(source, str) and not Path(source).exists():
        return hub.texts(source)
    if hub.is_data_set(Path(source)):
        return hub.local_texts(Path(source))
    return text_directory(Path(source), encoding), None


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


def _fingerprint(
    texts: Texts, key: str | None, vocab_size: int | None, ready: hub.Ready | None
) -> str:
    """A hash of all that decides the tokens, so that a cache entry is never stale."""
    digest = hashlib.sha256(f"1 {vocab_size} {tokenizers.__version__}".encode())
    if ready is not None:
        digest.update(f"\0{ready.end} {ready.tokenizer.to_str()}".encode())
    if key is not None:
        digest.update(f"\0{key}".encode())
        return digest.hexdigest()[:32]
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


def _tokenise(texts: Texts, vocab_size: int | None, ready: hub.Ready | None, entry: Path) -> None:
    """Write tokenizer and tokens to `entry`, which appears whole or not at all.

    Two processes may do this at once: both write the same bytes, and the second to finish keeps
    the entry of the first.
    """
    try:
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=entry.parent))
    except OSError as error:
        raise DataError(_unwritable(entry.parent, error)) from error
    try:
        ready = ready or hub.Ready(train_tokenizer(texts["train"], vocab_size or 0), 0)
        ready.tokenizer.save(str(draft / "tokenizer.json"))
        for split in SPLITS:
            _write(_pieces(ready.tokenizer, texts[split], ready.end), draft / f"{split}.npy")
        try:
            draft.rename(entry)
        except OSError:
            if not entry.is_dir():
                raise
    except OSError as error:
        raise DataError(_unwritable(entry.parent, error)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _unwritable(directory: Path, error: OSError) -> str:
    return (
        f"cannot write to the cache directory {directory} ({error.strerror}): "
        "set LBW_CACHE to a place that can be written and has room"
    )


def _write(pieces: Iterable[np.ndarray], path: Path) -> None:
    """Save the concatenation of all pieces; no more than one lies in memory."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        for piece in pieces:
            piece.tofile(file)
    np.save(path, np.memmap(raw, np.int32, mode="r"))
    raw.unlink()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
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


def encode(tokenizer: Tokenizer, texts: Iterable[str], end: int = 0) -> np.ndarray:
    """Token ids of all texts, the token `end` after each: one flat int32 array."""
    return np.concatenate(list(_pieces(tokenizer, texts, end)))


def _pieces(tokenizer: Tokenizer, texts: Iterable[str], end: int) -> Iterator[np.ndarray]:
    for text in texts:
        encodings = tokenizer.encode_batch(list(_chunks(text)), add_special_tokens=False)
        yield from (np.array(encoding.ids, np.int32) for encoding in encodings)
        yield np.array([end], np.int32)


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

"""Text and tokenizers of the Hugging Face hub, or of local directories in its formats.

Nothing here is imported before it is needed: `datasets` and `transformers` are in the extra
`train`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from train import files, gguf_file
from train.corpora import DataError, Texts

WIKITEXT = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
HELD_OUT = 200
"""Where a data set has no held-out split, one row of so many goes to valid, and one to test."""


class Ready(NamedTuple):
    """A tokenizer that need not be trained, and the id of its end-of-text token."""

    tokenizer: Tokenizer
    end: int


def texts(name: str) -> tuple[Texts, str]:
    """The three splits of a data set of the hub, and a key that changes with its content.

    `name` is "owner/name", "owner/name:configuration" or a key of `WIKITEXT`. Each row is a
    document; of WikiText, each article. Nothing is read before it is iterated over.

    Raises:
      DataError: without a network and a cached copy, or if there is no such data set or no column
        of text in it.
    """
    full = WIKITEXT.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", full):
        known = ", ".join(["standard-library", *WIKITEXT])
        raise DataError(
            f"there is no directory {name}, and no data set of that name: give a directory of "
            f"text files, one of {known}, or owner/name of a data set of the Hugging Face hub"
        )
    owner_name, _, configuration = full.partition(":")
    return _texts(name, owner_name, configuration or None, articles=name in WIKITEXT)


def is_data_set(directory: Path) -> bool:
    """Whether a directory holds files of a data set (Parquet, JSON Lines, CSV) and no text."""
    if not directory.is_dir() or any(directory.rglob("*.txt")):
        return False
    return any(path.suffix in {".parquet", ".jsonl", ".csv"} for path in directory.rglob("*"))


def local_texts(directory: Path) -> tuple[Texts, str]:
    """The same from files on this machine, as `datasets.load_dataset` finds splits in them."""
    return _texts(str(directory), str(directory), None, articles=False)


def tokenizer(name: str | Path) -> Ready:
    """The tokenizer of a model: a directory, a GGUF file, or a name on the hub.

    Raises:
      DataError: if there is none, or no network and no cached copy.
    """
    transformers = _module("transformers", "a model's own tokenizer")
    try:
        if Path(name).suffix == files.GGUF:
            found = gguf_file.tokenizer(Path(name))
        else:
            found = transformers.AutoTokenizer.from_pretrained(str(name))
        if len(found) <= 256:  # what it makes of a model's directory that holds no tokenizer
            raise ValueError(f"it has {len(found)} tokens")
    except ImportError:
        raise
    except Exception as error:  # whatever the two libraries raise for files that are damaged
        raise DataError(
            f"cannot load a tokenizer from {name} ({_first_line(error)}): give a directory that "
            "holds tokenizer.json, or a name on the Hugging Face hub and a network"
        ) from error
    if found.eos_token_id is None or not found.is_fast:
        raise DataError(f"the tokenizer of {name} has no end-of-text token, or no tokenizer.json")
    backend = _of_whole_texts(found.backend_tokenizer)
    backend.whole = found  # with chat template, special tokens, padding: for `save_tokenizer`
    return Ready(backend, found.eos_token_id)


def _of_whole_texts(tokenizer: Tokenizer) -> Any:
    """The same without the truncation and padding of a model's inputs, which a text is not."""
    if not (tokenizer.truncation or tokenizer.padding):
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def save_tokenizer(tokenizer: Tokenizer, end: int, directory: str | Path) -> None:
    """Write a tokenizer beside a model's weights, as `transformers` reads it.

    One that was loaded (`tokenizer`) is written with all that it came with: chat template, special
    tokens, side of padding, maximum length. A tokenizer that is there already is replaced.

    Raises:
      WeightsError: if it cannot be written.
    """
    transformers = _module("transformers", "writing a model's tokenizer")
    fast = getattr(tokenizer, "whole", None)
    if fast is None:
        token = tokenizer.id_to_token(end)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=token)
    folder = Path(directory)
    named = [str(path.relative_to(folder)) for path in folder.glob(_NAMED_TEMPLATES)]
    stale = [*_TOKENIZER_FILES, *named]
    with files.replacing(folder, ["tokenizer.json"], stale=stale) as draft:
        fast.save_pretrained(str(draft))


_TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
)
_NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
"""What `transformers` may find of another tokenizer."""


def _texts(name: str, path: str, configuration: str | None, *, articles: bool) -> tuple[Texts, str]:
    datasets = _module("datasets", f"the data set {name}")
    try:
        loaded = datasets.load_dataset(path, configuration)
    except Exception as error:  # files that are damaged raise whatever their reader does
        reason = _first_line(error.__cause__ or error) or type(error).__name__
        raise DataError(
            f"cannot load the data set {name} ({reason}): check the name and the "
            "network, or give a directory of text files"
        ) from error
    splits = {_SPLIT_NAMES.get(split, split): rows for split, rows in loaded.items()}
    if "train" not in splits:
        raise DataError(f"the data set {name} has no train split: it has {', '.join(loaded)}")
    rows = _with_held_out(splits)
    column = _text_column(name, rows["train"])
    key = " ".join([name, column, *(rows[split]._fingerprint for split in sorted(rows))])
    return {split: _Documents(name, rows[split], column, articles) for split in rows}, key


_SPLIT_NAMES = {"validation": "valid", "dev": "valid"}


def _with_held_out(splits: Mapping[str, Any]) -> dict[str, Any]:
    """The three splits; of train, rows are held out for those that are missing."""
    rows = {split: splits[split] for split in ("train", "valid", "test") if split in splits}
    train, count = splits["train"], len(splits["train"])
    missing = [split for split in ("valid", "test") if split not in rows]
    every = min(HELD_OUT, max(count // 10, len(missing) + 1))
    for i, split in enumerate(missing):
        rows[split] = train.select(range(i, count, every))
    if missing:
        rows["train"] = train.select([i for i in range(count) if i % every >= len(missing)])
    return rows


def _text_column(name: str, rows: Any) -> str:
    kinds = {column: str(getattr(kind, "dtype", "")) for column, kind in rows.features.items()}
    strings = [column for column in kinds if kinds[column] == "string"]
    if "text" in strings:
        return "text"
    if "text" in kinds:
        raise DataError(f"the column text of the data set {name} holds what is no text")
    if len(strings) != 1:
        raise DataError(
            f"the data set {name} has no column named text: it has {', '.join(rows.column_names)}"
        )
    return strings[0]


class _Documents:
    """The documents of one split: read from disk as they are asked for, as often as wanted."""

    def __init__(self, name: str, rows: Any, column: str, articles: bool):
        self._name, self._rows, self._column, self._articles = name, rows, column, articles

    def __iter__(self) -> Iterator[str]:
        texts = (text for text in self._rows[self._column] if text)
        try:
            yield from _articles(texts) if self._articles else texts
        except UnicodeDecodeError as error:  # of files whose rows are not looked into before
            row = f"{error.object[:40]!r}"
            raise DataError(
                f"the data set {self._name} is not utf-8 (a row begins {row}): convert its files"
            ) from error


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """WikiText's rows are lines; an article starts at a heading of the first level.

    >>> list(_articles(iter([" = A = \\n", "a\\n", " = = B = = \\n", "b\\n", " = C = \\n"])))
    [' = A = \\na\\n = = B = = \\nb\\n', ' = C = \\n']
    """
    article: list[str] = []
    for line in lines:
        if article and re.fullmatch(r" = [^=].* = \s*", line):
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def _module(name: str, purpose: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}: pip install --group train") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

"""Checkpoint directories: found here or on the hub, and safetensors read and written in them."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.presets import near

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF = ".gguf"
DRAFT = ".draft"
"""Where a save is written before it takes the place of what is there."""


class WeightsError(ValueError):
    """A checkpoint that cannot be used or written; the message lists all that is wrong."""


def directory(name: str | Path) -> Path:
    """Where the files of a local directory, or of a name on the hub, lie; a GGUF file is itself.

    Raises:
      WeightsError: where there are none, with the near names.
      ImportError: for a name on the hub without huggingface-hub.
    """
    path = Path(name)
    if path.is_dir() or (path.suffix == GGUF and path.is_file()):
        return path
    if (
        path.suffix == GGUF
        or path.is_absolute()
        or str(name).count("/") != 1
        or str(name).startswith((".", "~"))
    ):
        raise WeightsError(
            f"there is no directory {name}: give one that holds config.json and safetensors, a "
            f"{GGUF} file, or owner/name of a model on the Hugging Face hub{near(str(name))}"
        )
    return _downloaded(str(name))


def _downloaded(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{name} needs huggingface-hub: pip install --group train") from error
    kinds = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=kinds))
    except (OSError, ValueError) as error:  # its own errors are one or the other
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"cannot get {name} from the Hugging Face hub ({reason}): check the network and the "
            f"name{near(name)}"
        ) from error


class Checkpoint:
    """The tensors of a directory: shapes at once, content on demand, from memory-mapped files.

    As `transformers` does, it takes `model.safetensors` where there is one, and only else what an
    index names.

    Attributes:
      origin: where they are.
      shapes: of every tensor.
      problems: one sentence for each file that is missing or damaged.
    """

    def __init__(self, folder: Path, single: str = MODEL):
        self.folder, self.problems = folder, list[str]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Any, str]] = {}
        for file in self._names(single):
            self._open(file)

    @property
    def origin(self) -> str:
        return str(self.folder)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in the type of the file."""
        file, there = self._places[name]
        return file.get_slice(there)[index]

    def rename(self, names: Mapping[str, str]) -> None:
        """Let tensors be known by other names."""
        for old, new in names.items():
            self.shapes[new], self._places[new] = self.shapes.pop(old), self._places.pop(old)

    def drop(self, name: str) -> None:
        """Forget a tensor."""
        del self.shapes[name], self._places[name]

    def equal(self, one: str, two: str, rows: int = 4096) -> bool:
        """Whether two tables hold the same; so many rows are in memory at a time."""
        if self.shapes[one] != self.shapes[two]:
            return False
        count = self.shapes[one][0]
        parts = [(slice(at, min(at + rows, count)),) for at in range(0, count, rows)]
        return all(np.array_equal(self.read(one, part), self.read(two, part)) for part in parts)

    def _names(self, single: str) -> list[str]:
        if (self.folder / single).is_file():
            return [single]
        if single == MODEL and (self.folder / INDEX).is_file():
            return indexed(self.folder)
        found = sorted(path.name for path in self.folder.iterdir())
        raise WeightsError(
            f"{self.folder} holds no {single} (it holds {', '.join(found) or 'nothing'}): "
            f"{_what_to_do(found)}"
        )

    def _open(self, file: str) -> None:
        safetensors = _safetensors()
        path = self.folder / file
        if not path.is_file():
            self.problems.append(f"{file} is named in {INDEX} but missing")
            return
        try:
            content = safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as error:
            self.problems.append(f"{file} is cut off or damaged ({error})")
            return
        for name in content.keys():  # noqa: SIM118 (it is no mapping)
            self._places[name] = content, name
            self.shapes[name] = tuple(content.get_slice(name).get_shape())


def _what_to_do(found: list[str]) -> str:
    """How to come to safetensors from what a directory holds instead."""
    ends = {name.rpartition(".")[2] for name in found}
    if any(name.endswith(".safetensors") for name in found):
        return f"it has parts of a model without {INDEX}, get that file, too"
    if ends & {"bin", "pt", "pth"}:
        return (
            "pickled weights can run code when they are opened and are not read here; where you "
            "trust them, open them with transformers and save them with save_pretrained"
        )
    if "gguf" in ends:
        return "give the path of the .gguf file itself"
    return "save the model as safetensors"


def indexed(folder: Path) -> list[str]:
    """The names of the files that an index names. Raises `WeightsError` for a damaged one."""
    index = _json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    names: set[Any] = set(where.values()) if isinstance(where, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise WeightsError(
            f"{folder / INDEX} has no weight_map of tensors and the names of files beside it: "
            "get it anew"
        )
    return sorted(names)


def shards(folder: Path) -> list[str]:
    """The files that an index in `folder` names; none where there is no index that can be read."""
    try:
        return indexed(folder)
    except WeightsError:
        return []


def read_json(path: Path) -> dict[str, Any]:
    """What a file says. Raises `WeightsError` for one that is not there, or holds no object."""
    found = _json(path)
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no JSON object, but {found!r:.60}: get it anew")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path.parent} holds no {path.name}: give a directory as save_pretrained writes it"
        ) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path} ({error.strerror}): make it readable") from error
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}): it may be cut off") from error


@contextlib.contextmanager
def replacing(
    folder: Path, entries: Collection[str], stale: Collection[str] = ()
) -> Iterator[Path]:
    """Give a directory to write in, whose files then take the places of those in `folder`.

    Nothing in `folder` is touched before all is written. `entries` are the files by which the
    others are found. They go first and their successors come last: what is cut off in between
    says that it is not whole, and is never a mixture of old and new. Of `stale`, what was not
    written anew goes at the end.

    Raises:
      WeightsError: for anything that cannot be written; `folder` is then as it was.
    """
    draft = folder / DRAFT
    try:
        with telling(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(draft, ignore_errors=True)  # of a save that was cut off
            draft.mkdir()
            yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    with telling(folder):
        _swap(draft, folder, entries, stale)


def _swap(draft: Path, folder: Path, entries: Collection[str], stale: Collection[str]) -> None:
    written = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    for name in entries:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(written, key=lambda path: str(path) in entries):
        (folder / path).parent.mkdir(exist_ok=True)
        os.replace(draft / path, folder / path)
    for name in {*stale} - {str(path) for path in written}:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Tells of anything that cannot be written in one sentence."""
    try:
        yield
    except (OSError, _safetensors().SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WeightsError(
            f"cannot write to {folder} ({reason}): make room there, or give another directory"
        ) from error


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file, with the mode that the umask gives any new file."""
    path.touch()
    mode = path.stat().st_mode  # safetensors alone would leave it to its owner
    _safetensors().numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install --group train") from error
    return safetensors

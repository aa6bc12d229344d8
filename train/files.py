"""Checkpoint directories: found here or on the hub, and safetensors read and written in them."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.presets import near

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightsError(ValueError):
    """A checkpoint that cannot be used or written; the message lists all that is wrong."""


def directory(name: str | Path) -> Path:
    """Where the files of a local directory, or of a name on the hub, lie on this machine.

    Raises:
      WeightsError: where there are none, with the near names.
      ImportError: for a name on the hub without huggingface-hub.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).count("/") != 1 or str(name).startswith((".", "~")):
        raise WeightsError(
            f"there is no directory {name}: give one that holds config.json and safetensors, or "
            f"owner/name of a model on the Hugging Face hub{near(str(name))}"
        )
    return _downloaded(str(name))


def _downloaded(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name} needs huggingface-hub: pip install 'lbw_optax[train]'"
        ) from error
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

    Attributes:
      folder: where they are.
      shapes: of every tensor.
      problems: one sentence for each file that is missing or damaged.
    """

    def __init__(self, folder: Path, single: str = MODEL):
        self.folder, self.problems = folder, list[str]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for file in self._names(single):
            self._open(file)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in the type of the file."""
        return self._files[name].get_slice(name)[index]

    def _names(self, single: str) -> list[str]:
        if single == MODEL and (self.folder / INDEX).is_file():
            return sorted(set(read_json(self.folder / INDEX)["weight_map"].values()))
        if not (self.folder / single).is_file():
            found = sorted(path.name for path in self.folder.iterdir())
            raise WeightsError(
                f"{self.folder} holds no {single} (it holds {', '.join(found) or 'nothing'}): "
                "save the model as safetensors"
            )
        return [single]

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
            self._files[name] = content
            self.shapes[name] = tuple(content.get_slice(name).get_shape())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path.parent} holds no {path.name}: give a directory as save_pretrained writes it"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}): it may be cut off") from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the directory, and tells of anything that cannot be written in one sentence."""
    failures = (OSError, _safetensors().SafetensorError)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except failures as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WeightsError(
            f"cannot write to {folder} ({reason}): make room there, or give another directory"
        ) from error


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file, which appears whole or not at all."""
    draft = path.with_suffix(".draft")
    try:
        _safetensors().numpy.save_file(dict(tensors), draft, metadata={"format": "pt"})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install 'lbw_optax[train]'") from error
    return safetensors

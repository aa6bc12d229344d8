"""What a checkpoint says of its tokens and of generating text, kept from load to save."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train import files

FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Generation(NamedTuple):
    """JSON text, since what a model carries beside its parameters must be hashable.

    `ids` are those of `config.json`; `settings` is the content of `generation_config.json`.
    """

    ids: str
    settings: str


def read(folder: Path, config: Mapping[str, Any]) -> Generation:
    """Of a directory with this `config.json`, as `transformers` understands it.

    Raises:
      WeightsError: for a damaged `generation_config.json`.
    """
    known = _DEFAULTS.get(config.get("model_type", ""), {})
    ids = {name: config.get(name, known.get(name)) for name in IDS}
    given = files.read_json(folder / FILE) if (folder / FILE).is_file() else ids
    return of(ids, given)


def of(ids: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Generation:
    """From token ids, an id each or None or, of eos, several.

    >>> of({"eos_token_id": [2, 7]}).ids
    '{"bos_token_id": null, "eos_token_id": [2, 7], "pad_token_id": null}'
    """
    known = {name: ids.get(name) for name in IDS}
    return Generation(json.dumps(known), json.dumps(dict(known if settings is None else settings)))


_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {"bos_token_id": 1, "eos_token_id": 2},
    "olmo2": {"eos_token_id": 50_279, "pad_token_id": 1},
    "gemma": {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    "gemma3_text": {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
}
"""What `transformers` takes where a `config.json` names none."""

"""What an `adapter_config.json` of PEFT asks for: understood, or refused by name."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from train.files import WeightsError

FILE = "adapter_config.json"


class Adapter(NamedTuple):
    """LoRA as PEFT describes it, by its field names; modules go by Hugging Face's names."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, float] = {}
    modules_to_save: Sequence[str] = ()
    ensure_weight_tying: bool = False

    def targets(self, module: str) -> bool:
        """Whether this linear layer gets an adapter."""
        if _named(self.exclude_modules, module) or self.saves(module, whole_words=True):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules == "all-linear":
                return module != "lm_head"
            return re.fullmatch(self.target_modules, module) is not None
        return _named(self.target_modules, module) and self._transforms(module)

    def saves(self, module: str, whole_words: bool = False) -> bool:
        """Whether the adapter holds this module whole, or one that it is part of.

        PEFT compares ends of names, but whole words where it looks for targets.
        """
        parts = module.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if whole_words:
            return any(_named([name], module) for name in self.modules_to_save for module in above)
        return any(module.endswith(name) for name in self.modules_to_save for module in above)

    def rank(self, module: str) -> int:
        return _pattern(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _pattern(self.alpha_pattern, module, self.lora_alpha)

    def _transforms(self, module: str) -> bool:
        """Whether the number of the module's layer is among those that are asked for."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        for pattern in _several(self.layers_pattern) or [r"[^.]*"]:
            if found := re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<layer>\d+)\.", module):
                number = int(found["layer"])
                return number == wanted if isinstance(wanted, int) else number in wanted
        return False


def understood(config: Mapping[str, Any]) -> Adapter:
    """The adapter that a config describes.

    Every field is either understood, or says nothing of what A and B mean, or is not set.

    Raises:
      WeightsError: that names all other fields.
    """
    given = {name: value for name, value in config.items() if value is not None}
    refused = {
        name: value
        for name, value in given.items()
        if value and name not in {*Adapter._fields, *_PLAIN, *_SAYS_NOTHING}
    }
    refused |= {n: given[n] for n, plain in _PLAIN.items() if given.get(n, plain[0]) not in plain}
    refused |= {n: given[n] for n, is_one in _KINDS.items() if n in given and not is_one(given[n])}
    if "target_modules" not in given:
        refused["target_modules"] = None
    if refused:
        named = ", ".join(f"{name}={value!r}" for name, value in sorted(refused.items()))
        raise WeightsError(
            f"{FILE} asks for {named}: this is not implemented, and without it the adapter would "
            "be another one; merge it with peft and load the merged model"
        )
    asked = Adapter(**{name: given[name] for name in Adapter._fields if name in given})
    _compile(asked)
    return asked


_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base's weights
}
_SAYS_NOTHING = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size"),  # of megatron_config and use_qalora, which are refused
}


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not _is_flag(value)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _are(kind: Callable[[Any], bool], values: Any) -> bool:
    return isinstance(values, list | tuple) and all(map(kind, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_texts(value: Any) -> bool:
    return _is_text(value) or _are(_is_text, value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "r": _is_whole,
    "lora_alpha": _is_number,
    "lora_dropout": _is_number,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "ensure_weight_tying": _is_flag,
    "target_modules": _is_text_or_texts,
    "exclude_modules": _is_text_or_texts,
    "modules_to_save": lambda value: _are(_is_text, value),
    "layers_to_transform": lambda value: _is_whole(value) or _are(_is_whole, value),
    "layers_pattern": _is_text_or_texts,
    "rank_pattern": lambda value: isinstance(value, dict) and _are(_is_whole, [*value.values()]),
    "alpha_pattern": lambda value: isinstance(value, dict) and _are(_is_number, [*value.values()]),
}
"""What a field that is set may be; JSON's true is no number, and its NaN none either."""


def _compile(asked: Adapter) -> None:
    """Raise for a regular expression that is none."""
    whole = [names for names in (asked.target_modules, asked.exclude_modules) if names]
    patterns = [pattern for pattern in whole if isinstance(pattern, str)]
    patterns += _several(asked.layers_pattern)
    for pattern in [*patterns, *asked.rank_pattern, *asked.alpha_pattern]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise WeightsError(
                f"{FILE} holds {pattern!r}, which is no regular expression ({error}): mend it there"
            ) from error


def _several(names: str | Sequence[str] | None) -> list[str]:
    """The names, where one of them may stand alone."""
    return [names] if isinstance(names, str) else [*(names or ())]


def _named(names: str | Collection[str], module: str) -> bool:
    """Whether a pattern is the whole name, or one of several names is its end."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of the name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise

"""Small stand-ins for the paper's models, made here: four bases, and text that they do not know.

A base is pre-trained on Python's standard library and the first tenth of the text; fine-tuned is
on the other nine tenths. So it knows the domain a little, as a general model does.
"""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.rows import RUNS, TEXT, base
from train import corpora, pretrain
from train.presets import PRESETS, Config

_TINY = PRESETS["tiny"]
SHAPES: dict[str, Config] = {
    "3B": replace(_TINY, hidden_size=96, intermediate_size=288, num_hidden_layers=2, head_dim=24),
    "7B": _TINY,
    "14B": replace(_TINY, hidden_size=160, intermediate_size=480, num_hidden_layers=4, head_dim=40),
    "TinyLlama": replace(_TINY, attention_bias=False, tie_word_embeddings=False),
}
"""Shapes that differ as the real ones do: in width and depth, in biases and in the tied head."""

BASE_STEPS = 700
HELD_OUT = 150_000
"""Characters of each held-out split, from its beginning on, that a perplexity here is of."""


def prepare(directory: Path | None) -> None:
    """Write the text and train the bases that are not there yet."""
    texts = corpora.standard_library() if directory is None else corpora.text_directory(directory)
    library = corpora.standard_library()
    train = "\n".join(texts["train"])
    known, new = train[: len(train) // 10], train[len(train) // 10 :]
    own = [] if directory is None else list(library["train"])
    held_out = {split: "\n".join(texts[split])[:HELD_OUT] for split in ("valid", "test")}
    before = RUNS / "tiny" / "text-before"
    _write(before, {"train": "\n".join([known, *own]), **held_out})
    _write(TEXT, {"train": new, **held_out})
    for size in SHAPES:
        _pretrain(size, before)


def _write(directory: Path, texts: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (directory / f"{split}.txt").write_text(text, encoding="utf-8")


def _pretrain(size: str, text: Path) -> None:
    out = base(size)
    if (out / "model" / "tokenizer.json").exists():
        return
    shape = RUNS / "tiny" / f"shape-{size.lower()}"
    shape.mkdir(parents=True, exist_ok=True)
    (shape / "config.json").write_text(json.dumps(SHAPES[size].to_hf()))
    arguments = ["--model", str(shape), "--data", str(text), "--steps", str(BASE_STEPS)]
    code = pretrain.main([*arguments, "--out", str(out), "--eval-every", "0", "--track"])
    if code:
        raise SystemExit(code)

"""What every training script can be told: one dataclass, and what its fields may be."""

import codecs
import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple


class Allowed(NamedTuple):
    """What values an option may have, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, bits: int = 31) -> Allowed:
    """Whole numbers from `low` on that the arithmetic can hold."""
    return Allowed(f"must be at least {low} (and below 2^{bits})", lambda x: low <= x < 2**bits)


def _is_single(x: float) -> bool:
    """Whether it is neither lost nor infinite in the arithmetic of a run."""
    return x == 0 or 2.0**-126 <= abs(x) < 2.0**128 - 2.0**103


SINGLE = Allowed("is nothing that single precision holds (1.2e-38 to 3.4e38)", _is_single)
BELOW_ONE = Allowed("is 1 in single precision; use 0.9999999", lambda x: x < 1 - 2.0**-25)

Count = Annotated[int, whole(1)]
CountOrZero = Annotated[int, whole(0)]
Seed = Annotated[int, whole(0, bits=32)]
Positive = Annotated[
    float, Allowed("must be a finite number above 0", lambda x: x > 0 and math.isfinite(x)), SINGLE
]
NonNegative = Annotated[
    float,
    Allowed("must be a finite number, 0 or above", lambda x: x >= 0 and math.isfinite(x)),
    SINGLE,
]
Share = Annotated[float, Allowed("must be at least 0 and below 1", lambda x: 0 <= x < 1), BELOW_ONE]
Names = Annotated[tuple[str, ...], Allowed("needs at least one name", lambda x: len(x) >= 1)]
Devices = Annotated[
    tuple[int, int, int], Allowed("needs at least 1 along each axis", lambda x: min(x) >= 1)
]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of one run. A script adds fields of its own."""

    model: str
    """Name of a published size, directory of a model in Hugging Face's format, or "tiny"."""
    out: Path
    """Run directory. Given again with the same options, the run goes on where it stopped."""
    data: str = "wikitext-103"
    """standard-library, wikitext-2, wikitext-103, owner/name[:configuration] of a data set of the
    Hugging Face hub, or a directory of text files."""
    encoding: str = "utf-8"
    """Encoding of the text files, by Python's names (utf-8, latin-1, cp1252, utf-16)."""
    seed: Seed = 0
    """Seed of the initial parameters, the batches and dropout."""

    steps: Count = 1000
    """Optimizer steps."""
    batch_size: Count = 16
    """Sequences per step."""
    microbatches: Count = 1
    """Parts into which each batch is split. They are processed in turn, to save memory."""
    length: Count = 512
    """Tokens per sequence."""
    packing: bool = False
    """Pack documents into rows: attention stays within a document, and every token comes once per
    epoch. Without it, sequences are random pieces of the text."""

    optimizer: Literal["adamw", "adamw+clip", "lbw", "lbw+clip"] = "lbw"
    """lbw is AdamW under the guard; +clip adds clipping by the global norm. With adamw the guard
    only observes: the updates are AdamW's own, and nothing is rolled back."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    warmup: Share = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    b1: Share = 0.9
    """Decay of AdamW's first moment."""
    b2: Share = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay, on everything that is trained."""
    clip: Positive = 1.0
    """Largest global norm of the gradient, for the optimizers with +clip."""
    qk_clip: Positive | None = None
    """Largest attention logit: heads beyond it have their queries and keys scaled down. Kimi K2 had
    100. For models without QK-norm, not for adapters. None: no limit."""
    max_distance: Count = 50
    """Largest number of steps that a rollback may go back."""
    save_every: Count | None = None
    """Steps between two checkpoints. A killed run loses so many, and those made while a checkpoint
    was being written. None: one after five minutes and at least 100 steps."""
    adopt: Path | None = None
    """Checkpoint, or run directory, of a run without the guard. A new run starts from it, under the
    guard."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and matrix products."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters; of the frozen ones where only adapters are trained."""
    remat: bool = False
    """Keep only each layer's input for the backward pass, and compute the rest again."""
    scan: bool = False
    """Compile one layer and loop over it."""
    mesh: Devices | None = None
    """Devices along (data, fsdp, tensor): copies of the model, parts of parameters and batch, parts
    of heads and vocabulary. None: all along fsdp."""
    mesh_expert: Count = 1
    """Devices along one more axis: parts of the experts of a mixture, and of the batch."""
    loss_chunk: Count | None = None
    """Positions of a sequence whose logits are in memory at a time. None: all."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log-normaliser in the loss."""

    eval_every: CountOrZero = 100
    """Steps between two evaluations on the valid split. 0: only at the end."""
    eval_targets: Count = 131_072
    """Tokens predicted in an evaluation during the run."""
    final_eval_targets: Count | None = None
    """Tokens predicted in the final evaluation, for each held-out split. None: the whole split."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides log.jsonl in the run directory. No name: nowhere."""
    alert_webhook: str | None = None
    """URL that what the guard does is posted to as JSON, from a warning on: docs/alerts.md. It is
    written nowhere. A receiver that is down does not hold up the run."""
    prometheus: Path | None = None
    """File NAME.prom for the textfile collector of Prometheus, replaced every 50 steps."""


def problems(options: Options) -> list[str]:
    """What cannot be in these options, a sentence each; nothing is read or made for it.

    >>> problems(Options("tiny", Path("x"), steps=0, learning_rate=float("nan")))[1]
    '--learning-rate nan must be a finite number above 0'
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    single = [
        f"{flag(name)} {value} {wrong[0].words}"
        for name, hint in hints.items()
        if (value := getattr(options, name)) is not None
        and (wrong := [allowed for allowed in _allowed(hint) if not allowed.holds(value)])
    ]
    return single or list(_contradictions(options))


def _allowed(hint: Any) -> list[Allowed]:
    """What stands beside the type, also where the option may be None."""
    notes = [
        note
        for part in (hint, *typing.get_args(hint))
        for note in getattr(part, "__metadata__", ())
    ]
    return [note for note in notes if isinstance(note, Allowed)]


def _contradictions(options: Options) -> Iterator[str]:
    if options.batch_size % options.microbatches:
        yield (
            f"a batch of {options.batch_size} sequences cannot be cut into "
            f"{options.microbatches} microbatches: choose a batch size that is a multiple"
        )
    if not _is_text_encoding(options.encoding):
        yield f"--encoding {options.encoding}: Python knows no such encoding of text; try latin-1"


def _is_text_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
        "".encode(name)
    except (LookupError, ValueError):
        return False
    return True


def flag(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def as_json(options: Options) -> dict[str, Any]:
    """The options as plain JSON values, as a run directory keeps them.

    Without the URL of the webhook, which may hold a secret.
    """
    kept = {name: x for name, x in dataclasses.asdict(options).items() if name != "alert_webhook"}
    return json.loads(json.dumps(kept, default=str))

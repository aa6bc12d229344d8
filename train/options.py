"""What every training script can be told: one dataclass, read from the command line by tyro."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

Parsed = TypeVar("Parsed", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of one run. Fields of a script's own come on top."""

    model: str
    """Name of a published size, directory of a model in Hugging Face's format, or "tiny"."""
    out: Path
    """Run directory. Given again with the same options, the run goes on where it stopped."""
    data: str = "wikitext-103"
    """standard-library, wikitext-2, wikitext-103, owner/name[:configuration] of a data set of the
    Hugging Face hub, or a directory of text files."""
    seed: int = 0
    """Of initial parameters, batches and dropout."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step."""
    microbatches: int = 1
    """Parts that a step's batch is taken in, one after the other, to save memory."""
    length: int = 512
    """Tokens a sequence."""
    packing: bool = False
    """Attention stays within a document, and every token comes once an epoch; without it sequences
    are random pieces of the text."""

    optimizer: Literal["adamw", "adamw+clip", "lbw", "lbw+clip"] = "lbw"
    """lbw is AdamW under the guard; clip is by the global norm. Without the guard it only watches:
    the updates are AdamW's own, and nothing asks for a rollback."""
    learning_rate: float = 1e-4
    """Its peak."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up: constant, or down to zero at the last step."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises to its peak."""
    b1: float = 0.9
    """AdamW's decay of the first moment."""
    b2: float = 0.999
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.0
    """AdamW's, on everything that is trained."""
    clip: float = 1.0
    """Largest global norm of the gradient, for the optimizers with clip."""
    max_distance: int = 50
    """A rollback goes back this many steps at most."""
    save_every: int = 25
    """Steps between two checkpoints; a kill loses no more."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and products."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters; of the frozen ones where only adapters are trained."""
    remat: bool = False
    """Keep only each layer's input for the gradient, and compute the rest again."""
    scan: bool = False
    """Compile one layer and loop over it."""
    mesh: tuple[int, int, int] | None = None
    """Devices along (data, fsdp, tensor): copies, parts of parameters and batch, parts of heads and
    vocabulary. None: all along fsdp."""
    loss_chunk: int | None = None
    """Positions of a sequence whose logits are held at a time; None: all."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser."""

    eval_every: int = 100
    """Steps between two looks at the valid split; 0: only at the end."""
    eval_targets: int = 131_072
    """Targets of the valid split looked at during the run; at the end all are."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics go besides log.jsonl in the run directory."""


def parse(
    kind: type[Parsed],
    presets: Mapping[str, Parsed],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str,
) -> Parsed:
    """The options of a command line; ``--preset NAME`` chooses the defaults, first of all.

    Raises:
      SystemExit: for ``--help`` (0) and for arguments that mean nothing (2).
    """
    try:
        import tyro
    except ImportError:
        fail(prog, "the scripts need tyro: pip install 'lbw_optax[train]'")
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, given = _preset(given, next(iter(presets)))
    if name not in presets:
        fail(prog, f"--preset {name}: there is no such preset; there are {', '.join(presets)}")
    shown = f"{description}\n\n--preset NAME sets the defaults below: {', '.join(presets)}."
    return tyro.cli(
        kind, default=presets[name], args=given, prog=f"python -m {prog}", description=shown
    )


def _preset(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """Take ``--preset NAME`` or ``--preset=NAME`` out of the arguments.

    >>> _preset(["--steps", "3", "--preset", "tiny"], "large")
    ('tiny', ['--steps', '3'])
    """
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            rest = arguments[i + 1 :]
            if not equals:
                value, rest = (rest[0], rest[1:]) if rest else ("", [])
            return value, arguments[:i] + rest
    return default, arguments


def guarded_main(prog: str, job: Callable[[], int]) -> int:
    """Run `job`; what a user can mend ends in one sentence and exit code 2, not in a traceback."""
    from lbw_optax import GuardExhausted

    try:
        return job()
    except KeyboardInterrupt:
        print(f"{prog}: stopped before the first step; nothing was saved", file=sys.stderr)
        return 130
    except GuardExhausted as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 3
    except (ValueError, ImportError) as error:
        fail(prog, str(error))
    except OSError as error:
        fail(prog, f"{error.strerror or error}: {error.filename or 'a file of the run'}")


def fail(prog: str, sentence: str) -> NoReturn:
    """End the program with one sentence on standard error, and exit code 2."""
    print(f"{prog}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def as_json(options: Options) -> dict[str, Any]:
    """The options as plain JSON values, as a run directory keeps them."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))

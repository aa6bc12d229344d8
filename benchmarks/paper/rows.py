"""The rows of the paper's table, and each as a command: on the real models, or on tiny ones here.

The paper's reference rate is not in what is public. It is taken as 1e-4, a usual rate for LoRA on
7B models, so that its 1e-3 and 3e-3 are 10 and 30 times the reference. On the tiny models the
reference is the rate tuned for AdamW (`python -m benchmarks.paper --tune`), and the rows are the
same multiples of it. For full-parameter training the public text gives no rate at all.
"""

from pathlib import Path
from typing import NamedTuple

METHODS = {"adamw": "AdamW", "lbw": "with the guard"}
RUNS = Path("runs/paper")


class Case(NamedTuple):
    """A row.

    Attributes:
      name: in the result file.
      title: in the table.
      size: of the model: "3B", "7B", "14B" or "TinyLlama".
      multiple: of the reference learning rate.
      clip: largest global gradient norm; None is no clipping.
      paper: its perplexities, for AdamW and with the guard; None where it gives none.
    """

    name: str
    title: str
    size: str
    multiple: int
    clip: float | None
    paper: tuple[float | None, float | None]


CASES = (
    Case("reference", "reference rate", "7B", 1, None, (13.21, 10.74)),
    Case("lr-1e-3", "LR 1e-3", "7B", 10, None, (659.76, 10.33)),
    Case("lr-3e-3", "LR 3e-3", "7B", 30, None, (1885.24, 11.57)),
    Case("lr-1e-3-clip-1.0", "LR 1e-3, clip 1.0", "7B", 10, 1.0, (659.76, 10.39)),
    Case("lr-1e-3-clip-0.5", "LR 1e-3, clip 0.5", "7B", 10, 0.5, (891.37, None)),
    Case("3b", "3B, reference rate", "3B", 1, None, (None, None)),
    Case("3b-lr-1e-3", "3B, LR 1e-3", "3B", 10, None, (None, None)),
    Case("14b", "14B, reference rate", "14B", 1, None, (None, None)),
    Case("14b-lr-1e-3", "14B, LR 1e-3", "14B", 10, None, (None, None)),
    Case("tinyllama", "TinyLlama, all parameters", "TinyLlama", 1, None, (None, None)),
    Case("tinyllama-10", "TinyLlama, 10 × the rate", "TinyLlama", 10, None, (None, None)),
)


class Command(NamedTuple):
    """One run: ``python -m train.SCRIPT ARGUMENTS``."""

    script: str
    arguments: tuple[str, ...]
    out: Path

    def __str__(self) -> str:
        return " ".join(["python -m", f"train.{self.script}", *self.arguments])


def command(preset: str, case: Case, method: str, rates: dict[str, float]) -> Command:
    """The run of a case with one of `METHODS`; `rates` has the reference for "lora" and "full"."""
    script = "tinyllama_full" if case.size == "TinyLlama" else "qwen_lora"
    rate = case.multiple * rates["full" if script == "tinyllama_full" else "lora"]
    return train_command(preset, script, case.size, method, rate, case.clip, case.name)


def train_command(
    preset: str, script: str, size: str, method: str, rate: float, clip: float | None, name: str
) -> Command:
    """A run of a script; its directory is named after `name`, the method and the rate."""
    out = RUNS / preset / f"{name}-{method}-{rate:g}"
    model = _tiny(script, size) if preset == "tiny" else _large(script, size)
    optimizer = method if clip is None else f"{method}+clip"
    clipping = () if clip is None else ("--clip", f"{clip:g}")
    common = ("--optimizer", optimizer, "--learning-rate", f"{rate:g}", *clipping)
    return Command(script, (*model, *common, "--out", str(out)), out)


LARGE_RATES = {"lora": 1e-4, "full": 2e-5}


def _large(script: str, size: str) -> tuple[str, ...]:
    if script == "tinyllama_full":
        return ("--preset", "tinyllama-1.1b", "--weight-decay", "0")
    return ("--preset", f"qwen2.5-{size.lower()}", "--schedule", "constant", "--warmup", "0")


def base(size: str) -> Path:
    """Where the tiny base of a size lies (made by `benchmarks.paper_tiny`)."""
    return RUNS / "tiny" / f"base-{size.lower()}"


TEXT = RUNS / "tiny" / "text"
"""What the bases have not seen, in the layout of WikiText-2."""

_TINY = ("--schedule", "constant", "--warmup", "0", "--eval-every", "0", "--track")


def _tiny(script: str, size: str) -> tuple[str, ...]:
    model = ("--preset", "tiny", "--model", str(base(size) / "model"), "--data", str(TEXT))
    more = ("--steps", "150", "--weight-decay", "0.0001" if script == "qwen_lora" else "0")
    return (*model, *more, *_TINY)

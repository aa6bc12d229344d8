"""The tasks of the atlas: 48 rows of plain facts, drawn by seed.

Each half of 24 gets the same cards (so many tasks of each family, width, optimizer, ...), shuffled
by its own seed. So both halves have the same share of everything, and only how the facts meet in a
task differs. A card that does not fit a task (12 layers 512 wide, for the time it takes) goes to
another task.

All tasks are small: a run is a few seconds of one core, some 10¹¹ operations. Where a model is wide
or deep its steps are few and its batches small.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

HALVES = ("choose", "held-out")
TEXT = ("decoder", "experts", "recurrence")
"""Families that are trained on text, and that can be fine-tuned."""
POINTS = 10
"""Of the validation curve; the steps of a task are a multiple of it."""


class Task(NamedTuple):
    """One training task, but for its learning rate.

    `width` is that of the residual stream or of a hidden layer, `length` the tokens of a sequence
    or the patches of a picture (1 where there is no sequence), `vocabulary` the tokens, classes, or
    outputs. `warmup` is a share of the steps.
    """

    name: str
    half: str
    family: str
    block: str
    width: int
    depth: int
    batch: int
    length: int
    vocabulary: int
    steps: int
    optimizer: str
    b2: float
    weight_decay: float
    clip: float | None
    schedule: str
    warmup: float
    init: str
    layout: str
    dtype: str
    start: str
    rank: int
    shift: str
    seed: int

    @property
    def multiples(self) -> tuple[int, ...]:
        """Of the tuned rate, at which the methods run."""
        return (1, 3, 10, 30) if self.start == "scratch" else (1, 3, 10, 30, 100)


FAMILIES = {
    ("decoder", "pre-norm"): 3,
    ("decoder", "post-norm"): 2,
    ("decoder", "QK-norm"): 3,
    ("decoder", "parallel"): 2,
    ("experts", "pre-norm"): 2,
    ("recurrence", "scan"): 1,
    ("recurrence", "associative"): 2,
    ("convolution", "residual"): 1,
    ("convolution", "plain"): 1,
    ("classifier", "residual"): 1,
    ("classifier", "plain"): 1,
    ("diffusion", "adaptive"): 2,
    ("sequence", "sort"): 1,
    ("sequence", "reverse"): 1,
    ("regression", "plain"): 1,
}
WIDTHS = {32: 2, 48: 2, 64: 5, 96: 5, 128: 4, 192: 2, 256: 2, 384: 1, 512: 1}
DEPTHS = {1: 4, 2: 9, 3: 4, 4: 4, 6: 1, 8: 1, 12: 1}
STEPS = {100: 4, 150: 3, 200: 4, 300: 4, 400: 3, 700: 2, 1000: 2, 1500: 1, 3000: 1}
LENGTHS = {16: 4, 32: 8, 64: 8, 128: 4}
VOCABULARIES = {256: 14, 512: 10}
OPTIMIZERS = {"AdamW": 16, "Lion": 2, "Muon": 2, "SGD": 2, "Adafactor": 2}
B2 = {0.95: 9, 0.99: 6, 0.999: 9}
DECAYS = {0.0: 5, 1e-4: 6, 0.01: 4, 0.1: 6, 0.3: 3}
CLIPS = {None: 14, 1.0: 10}
SCHEDULES = {"constant": 6, "cosine": 8, "WSD": 5, "inverse root": 5}
WARMUPS = {0.0: 9, 0.02: 5, 0.1: 10}
INITS = {"standard": 12, "muP": 4, "zero output": 8}
LAYOUTS = {"matrices": 12, "heads": 6, "stacked": 6}
DTYPES = {"float32": 18, "bfloat16": 6}
STARTS = {"scratch": 16, "full": 4, "LoRA": 4}
SHIFTS = {"none": 8, "near": 8, "far": 8}
RANKS = {2: 4, 4: 4, 8: 4, 16: 4, 32: 4, 64: 4}

# Parameters of a layer over width², and the fewest and most rows of a batch (rows: tokens, patches
# or examples).
LAYER = {"decoder": 12, "experts": 20, "recurrence": 12, "convolution": 9, "classifier": 1}
LAYER |= {"diffusion": 16, "sequence": 12, "regression": 1}
ROWS = {"convolution": (256, 1024), "classifier": (32, 256), "diffusion": (256, 1024)}
ROWS |= {"sequence": (256, 1024), "regression": (32, 256)}
WIDE, WIDE_ROWS, TEXT_ROWS = 256, (64, 512), (128, 512)
PATCHES = 16  # of a picture
BUDGET = 1e11  # operations of a run's matrix products


def tasks(half: str | None = None) -> dict[str, Task]:
    """The tasks of one half, or all, by their names.

    >>> len(tasks("choose")), len(tasks())
    (24, 48)
    """
    drawn = [task for name in HALVES if half in (None, name) for task in draw(name)]
    return {task.name: task for task in drawn}


def draw(half: str, seed: int = 0) -> list[Task]:
    """The 24 tasks of one half: a pure function of its arguments."""
    rng = np.random.default_rng([seed, HALVES.index(half)])
    while True:  # some shuffles leave cards that fit no row
        with contextlib.suppress(_Misfit):
            return [_task(half, number, row) for number, row in enumerate(_dealt(rng))]


def _dealt(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"family": f, "block": b} for f, b in _cards(FAMILIES)]
    deal = _dealer(rng, rows)
    deal("start", STARTS, lambda row, card: card == "scratch" or row["family"] in TEXT)
    deal("shift", SHIFTS)
    deal("rank", RANKS)
    deal("width", WIDTHS, lambda row, card: card <= 256 or row["family"] not in ("experts",))
    deal("depth", DEPTHS, lambda row, card: card == 1 or _allowed({**row, "depth": card}, 150))
    deal("steps", STEPS, _allowed)
    deal("length", LENGTHS)
    deal("vocabulary", VOCABULARIES)
    deal("optimizer", OPTIMIZERS, _trains)
    for name, cards in (("b2", B2), ("weight_decay", DECAYS), ("clip", CLIPS)):
        deal(name, cards)
    deal("schedule", SCHEDULES)
    deal("warmup", WARMUPS)
    deal("init", INITS, _fits_init)
    deal("layout", LAYOUTS, _fits_layout)
    deal("dtype", DTYPES)
    return rows


class _Misfit(ValueError):
    """The cards of a fact do not fit the rows."""


def _dealer(rng: np.random.Generator, rows: list[dict[str, Any]]) -> Callable[..., None]:
    def deal(
        fact: str,
        counts: dict[Any, int],
        fits: Callable[[dict[str, Any], Any], bool] = lambda row, card: True,
    ) -> None:
        """Give each row one card; who finds none that fits takes one, and its owner another."""
        cards = _cards(counts)
        cards = [cards[i] for i in rng.permutation(len(cards))]
        owners: dict[int, int] = {}

        def place(row: int, tried: set[int]) -> bool:
            fitting = [i for i, card in enumerate(cards) if fits(rows[row], card)]
            for i in sorted(fitting, key=lambda i: i in owners):
                if i not in tried:
                    tried.add(i)
                    if i not in owners or place(owners[i], tried):
                        owners[i] = row
                        return True
            return False

        for row in range(len(rows)):
            if not place(row, set()):
                raise _Misfit(f"the cards of {fact} do not fit the rows")
        for i, row in owners.items():
            rows[row][fact] = cards[i]

    return deal


def _cards(counts: dict[Any, int]) -> list[Any]:
    return [card for card, count in counts.items() for _ in range(count)]


def _allowed(row: dict[str, Any], steps: int) -> bool:
    """Whether the time is enough for so many steps with the smallest batches."""
    return _per_row(row) * _rows(row)[0] * steps <= 1.5 * BUDGET


def _per_row(row: dict[str, Any]) -> float:
    layers = LAYER[row["family"]] * row["width"] ** 2 * row["depth"]
    return 6.0 * (layers + 300 * row["width"])  # 300: tokens, classes, pixels in and out


def _rows(row: dict[str, Any]) -> tuple[int, int]:
    return ROWS.get(row["family"], WIDE_ROWS if row["width"] >= WIDE else TEXT_ROWS)


def _trains(row: dict[str, Any], optimizer: str) -> bool:
    """SGD hardly trains a transformer in so few steps."""
    simple = ("convolution", "classifier", "regression")
    return optimizer != "SGD" or row["family"] in simple


def _fits_init(row: dict[str, Any], init: str) -> bool:
    """A base is initialised as usual, and rates of SGD are not those of muP."""
    if row["start"] != "scratch":
        return init == "standard"
    return init != "muP" or row["optimizer"] != "SGD"


def _fits_layout(row: dict[str, Any], layout: str) -> bool:
    """Muon and adapters take matrices; heads are those of attention."""
    if layout == "matrices":
        return True
    attention = row["family"] in ("decoder", "experts", "diffusion", "sequence")
    return (
        row["optimizer"] != "Muon"
        and row["start"] != "LoRA"
        and (attention if layout == "heads" else row["depth"] > 1)
    )


def _task(half: str, number: int, row: dict[str, Any]) -> Task:
    """What follows from the cards: the batch from the time there is, and what has no meaning."""
    row = dict(row)
    family, tuned = row["family"], row["start"] != "scratch"
    if family not in TEXT:
        row["vocabulary"] = {"sequence": 32, "diffusion": PATCHES, "regression": 1}.get(family, 10)
        row["length"] = {"sequence": 32, "diffusion": PATCHES, "convolution": PATCHES}.get(
            family, 1
        )
    low, high = _rows(row)
    wanted = BUDGET / (_per_row(row) * row["steps"])
    rows = int(2 ** np.floor(np.log2(np.clip(wanted, low, high))))
    row["length"] = min(row["length"], rows // 4)
    row["batch"] = rows // row["length"]
    row["b2"] = row["b2"] if row["optimizer"] == "AdamW" else _OWN_B2.get(row["optimizer"], 0.999)
    row["weight_decay"] = _OWN_DECAY.get(row["optimizer"], row["weight_decay"])
    row["rank"] = row["rank"] if row["start"] == "LoRA" else 0
    row["shift"] = row["shift"] if tuned else "–"
    name = f"{half[0]}{number:02d}-{family}-{row['width']}x{row['depth']}"
    return Task(name=name, half=half, seed=100 * HALVES.index(half) + number, **row)


_OWN_B2 = {"Lion": 0.99}
_OWN_DECAY = {"Adafactor": 0.0, "SGD": 1e-4}  # Adafactor's is not of the rate, SGD's rates are high


def facts(task: Task) -> Sequence[str]:
    """What a table says of a task, a column each."""
    decay = "" if task.optimizer == "Adafactor" else f", decay {task.weight_decay:g}"
    second = f" b2 {task.b2:g}" if task.optimizer == "AdamW" else ""
    warm = f", warm-up {task.warmup:.0%}" if task.warmup else ""
    rank = f" {task.rank}" if task.start == "LoRA" else ""
    start = task.start if task.start == "scratch" else f"{task.start}{rank}, shift {task.shift}"
    clip = ", clip 1.0" if task.clip else ""
    return (
        task.name,
        f"{task.family}, {task.block}",
        f"{task.width} × {task.depth}",
        f"{task.batch} × {task.length}",
        f"{task.steps}",
        f"{task.optimizer}{second}{decay}{clip}",
        f"{task.schedule}{warm}",
        f"{task.init}, {task.layout}, {task.dtype}",
        start,
    )

"""AdamW and the guard side by side, at the tuned learning rate and at 10 and 100 times it.

A tiny decoder learns the source of Python's standard library: from scratch with the standard
recipe (warm-up and cosine, clip 1.0, b2 0.95, weight decay 0.1), then by LoRA on what the first
run has learned, at a constant rate. Both runs of a pair have the same seed, batches and initial
parameters. The rate was tuned for AdamW on the valid split (--tune); the table is about the test
split. One more pair, by LoRA at 100 times the rate, meets 22 batches whose loss is NaN: the guard
goes back to before them, and AdamW alone is lost.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lbw_optax
from lbw_optax.law.control import LAW
from train import data, figure, loop, lora, memory, mishap
from train.command import interrupt_ends
from train.interrupt import Interrupt, Stopped
from train.jsonl import finite
from train.model import PRESETS, Config, Decoder, next_token_loss, split
from train.progress import Progress
from train.provenance import provenance

TITLES = {"scratch": "From scratch, warm-up and cosine", "lora": "LoRA on a briefly trained base"}
METHODS = {"adamw": "AdamW", "guard": "guard"}
MISHAP, ROLLBACK = "mishap", "guard + rollback"
MISHAP_TITLE = f"LoRA, 100×, {mishap.LENGTH} bad batches"
MULTIPLES = (1, 10, 100)
HARD = "\nstopped at once; what was finished is not kept\n"
# The best of the grid for AdamW: benchmarks/results/demo_tuning.json, made with --tune.
RATES = {"scratch": 2e-3, "lora": 1e-3}
GRID = {
    "scratch": (7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3),
    "lora": (5e-4, 1e-3, 2e-3, 3e-3, 5e-3),
}


class Settings(NamedTuple):
    """What decides how long the demo takes."""

    config: Config = PRESETS["tiny"]
    batch_size: int = 8
    length: int = 64
    scratch_steps: int = 700
    lora_steps: int = 300
    evaluated: int = 65_536  # targets of the held-out split
    rank: int = 8
    alpha: float = 16.0

    def steps(self, task: str) -> int:
        return {"scratch": self.scratch_steps, "lora": self.lora_steps}[task]


FULL = Settings()
QUICK = Settings(
    config=replace(PRESETS["tiny"], num_hidden_layers=1, hidden_size=32, intermediate_size=64),
    batch_size=2,
    length=32,
    scratch_steps=12,
    lora_steps=60,
    evaluated=512,
)


class Run(NamedTuple):
    """One finished run."""

    task: str
    method: str
    rate: float
    perplexity: float
    seconds: float
    params: Any
    history: dict[str, np.ndarray]
    events: list[lbw_optax.Event]
    rollbacks: Sequence[Any] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    try:
        with interrupt_ends("train.demo", "stopped before its end"):
            corpus = data.load(options.data_dir, vocab_size=settings.config.vocab_size)
            bench = Bench(settings, corpus, options.seed)
            return tune(bench, options.tune) if options.tune else compare(bench, options.out)
    except data.DataError as error:
        parser.exit(2, f"train.demo: {error}\n")
    except OSError as error:
        parser.exit(2, f"train.demo: cannot write {error.filename or 'a file'}: {error.strerror}\n")


def compare(bench: "Bench", out: Path) -> int:
    """The demo itself: all runs, then table, figure and numbers, also when it is interrupted."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    steps = sum(map(bench.settings.steps, TITLES)) * len(MULTIPLES) * len(METHODS)
    steps += bench.settings.lora_steps * len(METHODS)
    runs: list[Run] = []
    after = contextlib.ExitStack()
    with _Progress(steps) as progress, after, contextlib.suppress(Stopped):
        for run in _runs(bench, progress):
            if not runs:  # until here Ctrl-C has ended the process at once
                progress.interrupted = after.enter_context(Interrupt(HARD))
            runs.append(run)
            progress.note(f"{_title(run)}: test perplexity {run.perplexity:.2f}")
    seconds = time.perf_counter() - started
    _write_json(out / "demo.json", _document(bench, runs) | {"seconds": round(seconds, 1)})
    figure.figure(_panels(runs), out / "demo.png")
    print(table(runs, bench))
    print(f"\n{seconds:.0f} s. Figure and numbers: {out / 'demo.png'}, {out / 'demo.json'}")
    planned = (len(TITLES) * len(MULTIPLES) + 1) * len(METHODS)
    if len(runs) < planned:
        print(f"Stopped: {len(runs)} of {planned} runs were finished, and only these are shown.")
        return 130
    return 0


class _Progress(Progress):
    """Ends the run that it counts between two steps, once it is interrupted."""

    interrupted: Interrupt | None = None

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        super().step(step, metrics)
        if self.interrupted:
            raise Stopped


def _runs(bench: "Bench", progress: Progress) -> Iterator[Run]:
    """All runs in the order of the table; the first one's result is the base for LoRA."""
    base = None
    for name in TITLES:
        task = bench.from_scratch() if base is None else bench.lora(base)
        for multiple in MULTIPLES:
            for method in METHODS:
                run = bench.run(task, method, multiple * RATES[name], "test", progress)
                base = run.params if base is None else base
                yield run
    yield bench.lost(task, MULTIPLES[-1] * RATES["lora"], progress)
    yield bench.rescued(task, MULTIPLES[-1] * RATES["lora"], progress)


def tune(bench: "Bench", path: Path) -> int:
    """AdamW over `GRID`, judged on the valid split; LoRA's base is the best run from scratch."""
    task, found = bench.from_scratch(), {}
    with Progress(sum(bench.settings.steps(name) * len(GRID[name]) for name in GRID)) as progress:
        for name, rates in GRID.items():
            runs = [bench.run(task, "adamw", rate, "valid", progress) for rate in rates]
            best = min(runs, key=lambda run: run.perplexity)
            found[name] = {
                "best": best.rate,
                "valid perplexity by learning rate": {f"{r.rate:g}": r.perplexity for r in runs},
            }
            progress.note(f"{TITLES[name]}: {found[name]}")
            task = bench.lora(best.params)
    _write_json(path, bench.facts() | {"tuning": found})
    return 0


class Task(NamedTuple):
    """What is trained, from where, and on which batches."""

    name: str
    loss_fn: loop.LossFn
    params: Any
    frozen: Any
    batch: Callable[[int], np.ndarray]


class Bench:
    """What all runs share: text, held-out windows, and one compiled step per task and method."""

    def __init__(self, settings: Settings, corpus: data.Corpus, seed: int):
        self.settings, self.corpus, self.seed = settings, corpus, seed
        self._provenance = provenance()  # of the code that was loaded, whatever comes meanwhile
        self._windows = {
            name: data.windows(
                tokens, batch_size=32, length=settings.length, limit=settings.evaluated
            )
            for name, tokens in (("valid", corpus.valid), ("test", corpus.test))
        }
        # The learning rate lies in the state, so that the step is compiled once for all rates.
        recipes = {"scratch": _standard_recipe(settings.scratch_steps), "lora": optax.adamw}
        self._optimizers = {}
        for task, recipe in recipes.items():
            adamw = optax.inject_hyperparams(recipe)(learning_rate=0.0)
            self._optimizers[task] = {"adamw": adamw, "guard": lbw_optax.lbw_guard(adamw)}

    def from_scratch(self) -> Task:
        model = Decoder(self.settings.config, rngs=nnx.Rngs(self.seed))
        return self._task("scratch", model, nnx.Param, first_batch=0)

    def lora(self, base: Any) -> Task:
        """Adapters on `base`; their batches go on where those of the base ended."""
        model = Decoder(self.settings.config, rngs=nnx.Rngs(self.seed))
        nnx.update(model, nnx.State(base))
        rank, alpha = self.settings.rank, self.settings.alpha
        lora.add_lora(model, rank=rank, alpha=alpha, rngs=nnx.Rngs(self.seed))
        return self._task("lora", model, nnx.LoRAParam, first_batch=self.settings.scratch_steps)

    def _task(self, name: str, model: Decoder, trained: type, first_batch: int) -> Task:
        graphdef, params, frozen = split(model, trained)
        size, length = self.settings.batch_size, self.settings.length

        def batch(step: int) -> np.ndarray:
            at = first_batch + step
            return data.sample(self.corpus.train, self.seed, at, batch_size=size, length=length)

        return Task(name, next_token_loss(graphdef), params, frozen, batch)

    def run(self, task: Task, method: str, rate: float, judged_on: str, progress: Progress) -> Run:
        """Train, and measure the perplexity on the split `judged_on`."""
        started = time.perf_counter()
        tx, steps = self._optimizers[task.name][method], self.settings.steps(task.name)
        progress.start(_name(task.name, method, rate), steps)
        events: dict[int, lbw_optax.Event] = {}

        def on_step(step: int, metrics: dict[str, np.ndarray], opt_state: Any) -> None:
            progress.step(step, metrics)
            if method == "guard" and step % 50 == 0:  # the state holds the last 64
                events.update((event.number, event) for event in lbw_optax.events(opt_state))

        fit = loop.fit(
            task.loss_fn,
            task.params,
            tx,
            task.batch,
            steps,
            frozen=task.frozen,
            opt_state=optax.tree.set(tx.init(task.params), learning_rate=jnp.float32(rate)),
            on_step=on_step,
        )
        if method == "guard":
            events.update((event.number, event) for event in lbw_optax.events(fit.opt_state))
        return Run(
            task=task.name,
            method=method,
            rate=rate,
            perplexity=loop.perplexity(
                task.loss_fn, fit.params, self._windows[judged_on], frozen=task.frozen
            ),
            seconds=time.perf_counter() - started,
            params=fit.params,
            history=fit.history,
            events=list(events.values()),
        )

    def rescued(self, task: Task, rate: float, progress: Progress) -> Run:
        """LoRA through a bad stretch of data, with rollback (`train.mishap`)."""
        started = time.perf_counter()
        tx, flawed = self._optimizers["lora"]["guard"], self._flawed(task)
        progress.start(_mishap_name("guard"), flawed.steps)
        found = mishap.survive(
            flawed,
            task.params,
            task.frozen,
            tx,
            optax.tree.set(tx.init(task.params), learning_rate=jnp.float32(rate)),
            progress.step,
            lambda undone: progress.move(-undone),
        )
        return Run(
            task=MISHAP,
            method="guard",
            rate=rate,
            perplexity=self._test_perplexity(task, found.params),
            seconds=time.perf_counter() - started,
            params=found.params,
            history=found.history,
            events=found.events,
            rollbacks=found.rollbacks,
        )

    def lost(self, task: Task, rate: float, progress: Progress) -> Run:
        """The same batches, AdamW without the guard."""
        started = time.perf_counter()
        tx, flawed = self._optimizers["lora"]["adamw"], self._flawed(task)
        progress.start(_mishap_name("adamw"), flawed.steps)
        fit = loop.fit(
            flawed.loss,
            task.params,
            tx,
            flawed.weighed,
            flawed.steps,
            frozen=task.frozen,
            opt_state=optax.tree.set(tx.init(task.params), learning_rate=jnp.float32(rate)),
            on_step=lambda step, metrics, opt_state: progress.step(step, metrics),
        )
        return Run(
            task=MISHAP,
            method="adamw",
            rate=rate,
            perplexity=self._test_perplexity(task, fit.params),
            seconds=time.perf_counter() - started,
            params=fit.params,
            history=fit.history,
            events=[],
        )

    def _flawed(self, task: Task) -> mishap.Flawed:
        return mishap.Flawed(task.loss_fn, task.batch, self.settings.lora_steps)

    def _test_perplexity(self, task: Task, params: Any) -> float:
        return loop.perplexity(task.loss_fn, params, self._windows["test"], frozen=task.frozen)

    def facts(self) -> dict[str, Any]:
        """What a result file says about code, machine, settings and text."""
        settings = self.settings._asdict() | {"config": vars(self.settings.config)}
        tokens = {name: len(getattr(self.corpus, name)) for name in data.SPLITS}
        return self._provenance | {
            "law": LAW,
            "seed": self.seed,
            "settings": settings,
            "tokens": tokens,
        }


def _standard_recipe(steps: int) -> Callable[..., optax.GradientTransformation]:
    """A tenth of the run up, a cosine down to zero; the constants of today's pre-training."""
    warmup = max(steps // 10, 1)
    shape = optax.warmup_cosine_decay_schedule(1 / warmup, 1.0, warmup, steps)

    def recipe(learning_rate: jax.Array) -> optax.GradientTransformation:
        adamw = optax.adamw(lambda count: learning_rate * shape(count), b2=0.95, weight_decay=0.1)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    return recipe


def table(runs: Sequence[Run], bench: Bench) -> str:
    """Held-out perplexities, each beside its ratio to AdamW at the tuned learning rate."""
    lines = [
        f"Perplexity on {bench.settings.evaluated} held-out targets, "
        "and its ratio to AdamW at the tuned learning rate"
    ]
    for task, title in TITLES.items():
        lines.append(f"\n{title:<34}" + "".join(f"{name:>18}" for name in METHODS.values()))
        for multiple in MULTIPLES:
            rate = multiple * RATES[task]
            cells = "".join(f"{_cell(runs, task, method, rate):>18}" for method in METHODS)
            lines.append(f"  learning rate {rate:<6g} {_multiple(multiple):<12}{cells}")
    lines += [f"\n{_say_mishap(run, runs)}" for run in runs if run.task == MISHAP]
    return "\n".join(lines)


def _cell(runs: Sequence[Run], task: str, method: str, rate: float) -> str:
    found = [run for run in runs if (run.task, run.method, run.rate) == (task, method, rate)]
    return f"{found[0].perplexity:.2f} {_ratio(found[0], runs):>6.2f}×" if found else "–"


def _say_mishap(run: Run, runs: Sequence[Run]) -> str:
    said = f"{_title(run)}: {run.perplexity:.2f} {_ratio(run, runs):>6.2f}×"
    if run.method == "adamw":
        return said
    went = ", ".join(f"from step {r.from_step} to {r.to_step}" for r in run.rollbacks)
    return f"{said}; went back {went or 'nowhere'}"


def _ratio(run: Run, runs: Sequence[Run]) -> float:
    task = "lora" if run.task == MISHAP else run.task
    tuned = next(r for r in runs if (r.task, r.method) == (task, "adamw"))
    return run.perplexity / tuned.perplexity


def _multiple(multiple: float) -> str:
    return "tuned" if multiple == 1 else f"{multiple:g}×"


def _name(task: str, method: str, rate: float) -> str:
    return f"{TITLES[task]}, {METHODS[method]}, learning rate {rate:g}"


def _mishap_name(method: str) -> str:
    return f"{MISHAP_TITLE}, {ROLLBACK if method == 'guard' else METHODS[method]}"


def _title(run: Run) -> str:
    if run.task == MISHAP:
        return _mishap_name(run.method)
    return _name(run.task, run.method, run.rate)


def _panels(runs: Sequence[Run]) -> dict[str, list[figure.Curve]]:
    """A column per task; AdamW first, so that the legend's columns are the methods."""
    last = {MISHAP_TITLE: [_mishap_curve(run) for run in runs if run.task == MISHAP]}
    return _pairs(runs) | {title: curves for title, curves in last.items() if curves}


def _pairs(runs: Sequence[Run]) -> dict[str, list[figure.Curve]]:
    return {
        title: [
            figure.Curve(
                METHODS[method],
                run.history["loss"],
                run.history.get("scale"),
                run.events,
                group=_multiple(round(run.rate / RATES[task])),
            )
            for method in METHODS
            for run in runs
            if (run.task, run.method) == (task, method)
        ]
        for task, title in TITLES.items()
        if any(run.task == task for run in runs)
    }


def _mishap_curve(run: Run) -> figure.Curve:
    lost = np.flatnonzero(~np.isfinite(run.history["loss"]))
    bad = (int(lost[0]), int(lost[0]) + mishap.LENGTH - 1) if lost.size else None
    return figure.Curve(
        ROLLBACK if run.method == "guard" else METHODS[run.method],
        run.history["loss"],
        run.history.get("scale"),
        run.events,
        group=_multiple(MULTIPLES[-1]),
        bad=bad,
    )


def _document(bench: Bench, runs: Sequence[Run]) -> dict[str, Any]:
    return bench.facts() | {
        "runs": [
            {
                "task": run.task,
                "method": run.method,
                "learning_rate": run.rate,
                "multiple_of_tuned": round(run.rate / RATES.get(run.task, RATES["lora"])),
                "rollbacks": [rollback._asdict() for rollback in run.rollbacks],
                "perplexity": run.perplexity,
                "ratio_to_tuned_adamw": _ratio(run, runs),
                "seconds": round(run.seconds, 2),
                "events": [event._asdict() for event in run.events],
                "history": {
                    name: [float(f"{x:.5g}") for x in run.history[name]]
                    for name in ("loss", "scale")
                    if name in run.history
                },
            }
            for run in runs
        ]
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(document), allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The first run tokenises the text and keeps it in $LBW_CACHE (~/.cache/lbw_optax).",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="train on train.txt, valid.txt and test.txt in DIR, or on any three or more *.txt "
        "files there (default: the source of Python's standard library)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where demo.json and demo.png go, over those of an earlier run (default: runs/demo)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="seed of the initial parameters and the batches (default: 0)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few dozen steps a run, to see that everything works; the numbers mean nothing",
    )
    parser.add_argument(
        "--tune",
        type=Path,
        metavar="FILE",
        help="instead of the demo: train AdamW on a grid of learning rates and write the "
        "perplexities on the valid split to FILE (JSON)",
    )
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


if __name__ == "__main__":
    memory.keep_freed()
    raise SystemExit(main())

"""Faults of one layer: what guard, frozen layers, a rollback and QK-clip are each worth.

    python -m benchmarks.freezing --data-dir wikitext-2       # a quarter of an hour
    python -m benchmarks.pages                                # docs/freezing.md

Two parts (`--parts`). `faults`: one layer of the fault benchmark's decoder, six layers deep here,
is broken in step 150 of 300, under each method. `sound`: nothing is broken, on that decoder at
several rates and on tasks of the health benchmark with each leaf a group; how often a group is
frozen all the same. Every cell is appended to the result file as it finishes, and a cell that is
there is not run again, as in the other benchmarks.
"""

import argparse
import contextlib
import functools
import tempfile
import warnings
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
from benchmarks import runner
from benchmarks.command import check_names, refuse
from benchmarks.faults import run as faults
from benchmarks.faults.run import Text
from benchmarks.health.task import Now
from benchmarks.health.tasks import tasks
from benchmarks.records import FOLDER, Cell, Record, law, out_help, quick
from benchmarks.runner import Book
from lbw_optax import GuardExhausted, RollbackManager, by_layer, lbw_guard
from train import data, jsonl, model
from train.data import DataError
from train.provenance import provenance

RESULTS = FOLDER / "freezing.jsonl"
CONFIG = replace(faults.CONFIG, num_hidden_layers=6)
STEPS, STRUCK, LAYER = 300, 150, 2
"""Of a run; the step in which its layer is broken; the layer."""
RATE = 3e-3
"""AdamW's, tuned by the fault benchmark."""
SEEDS = (0, 1, 2)
SMOOTHED = 20
"""Steps over which the held-out loss is meant where steps are counted."""
PARTS = ("faults", "sound")


class Method(NamedTuple):
    title: str
    guarded: bool = True
    freezes: bool = False
    rollback: bool = False
    clips: bool = False


METHODS = {
    "guard": Method("guard: scale and skip"),
    "freeze": Method("guard + freezing", freezes=True),
    "rollback": Method("guard + rollback", rollback=True),
    "all": Method("guard + freezing + rollback", freezes=True, rollback=True),
    "qk-clip": Method("guard + QK-clip", clips=True),
    "adamw": Method("AdamW", guarded=False),
}


class Fault(NamedTuple):
    """What befalls one layer, from step `STRUCK` on."""

    title: str
    steps: int = 1


FAULTS = {
    "none": Fault("no fault", 0),
    "weights": Fault("its weights × 10"),
    "logits": Fault("its attention logits grow 1,000 times over 60 steps", 60),
    "moment": Fault("its second moment is lost"),
    "nan": Fault("NaN in its gradient, 20 steps", 20),
}
GROWTH = 1.06
"""Of the weights of queries and of keys, in each step of `logits`."""

SOUND_RATES = (1, 10, 30)
"""Multiples of the tuned rate, at which nothing is broken."""
SOUND_TASKS = (
    "rare-1",
    "second-source",
    "heavy-tail-1.5",
    "masked-tenth",
    "pinn",
    "curriculum-stages",
    "kl-annealing",
    "q-learning",
    "gan",
)
"""Of the health benchmark, those that look most ill to a watcher of gradients."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that the result file lacks."""
    options = _options(arguments)
    provenance()  # now, before anything is edited
    try:
        text = faults.load(options.data_dir)
    except DataError as error:
        refuse(str(error))
    facts = faults.facts(text)
    facts["model"] |= {"num_hidden_layers": CONFIG.num_hidden_layers}
    book = Book(
        options.out, facts, functools.partial(measure, text), faults.about(options.data_dir)
    )
    cells = [cell for part in options.parts for cell in plan(part, options.seeds)]
    runner.run(book, cells, _line)


def plan(part: str, seeds: Sequence[int]) -> list[Cell]:
    """The cells of one part; those of one method stand together, they share a program."""
    if part == "faults":
        return [cell_of(m, RATE, f, s) for m in METHODS for s in seeds for f in FAULTS]
    decoder = [cell_of("freeze", k * RATE, "none", s) for k in SOUND_RATES[1:] for s in seeds]
    law_now = law(True)
    sound = [
        {"task": name, "seed": seed, "steps": tasks()[name].steps, "law": law_now}
        for name in SOUND_TASKS
        for seed in seeds
    ]
    return decoder + sound


def cell_of(method: str, rate: float, fault: str, seed: int) -> Cell:
    """One run of the decoder."""
    cell = {"method": method, "rate": round(rate, 12), "fault": fault, "seed": seed}
    return {**cell, "steps": STEPS, "law": law(METHODS[method].guarded)}


def measure(text: Text, cell: Cell) -> Record:
    """The numbers of one cell."""
    if "task" in cell:
        return _sound(cell)
    found = _run(text, cell)
    level = _smoothed(found.curve)
    return {
        "loss": jsonl.finite(round(found.final, 5)),
        "level": [jsonl.finite(round(float(x), 4)) for x in level],
        "steps_done": found.steps_done,
        "frozen": found.frozen,
        "freezes": found.freezes,
        "skips": found.skips,
        "rollbacks": found.rollbacks,
        "ended": found.ended,
        **({"clips": found.clips} if METHODS[cell["method"]].clips else {}),
    }


# The decoder


class Run(NamedTuple):
    """What became of a run."""

    final: float  # loss on the test split
    curve: np.ndarray  # held-out loss after each training step
    steps_done: int
    frozen: int  # groups, summed over steps
    freezes: int
    skips: int
    rollbacks: list[str]
    ended: bool  # the guard or the rollback gave up
    clips: int  # of QK-clip


def _run(text: Text, cell: Cell) -> Run:
    method, fault = METHODS[cell["method"]], cell["fault"]
    params = _split(cell["seed"])[1]
    state: Any = (params, _optimizer(cell["method"], cell["rate"]).init(params))
    step_of = functools.partial(_step, cell["method"], cell["rate"])
    curve, frozen, ended, done = np.full(STEPS, np.nan), [], False, 0
    with _manager(method.rollback) as rollback:
        step, state = rollback.resume(state) if rollback else (0, state)
        while step < STEPS and not ended:
            # The machine's fault comes once, at its time; the data's step follows the rollback.
            strikes = STRUCK <= done < STRUCK + FAULTS[fault].steps
            code = list(FAULTS).index(fault) if strikes else 0
            at = rollback.data_step(step) if rollback else step
            tokens = data.sample(
                text.train, cell["seed"], at, batch_size=faults.BATCH, length=faults.LENGTH
            )
            state, loss, still = step_of(np.int32(code), tokens, text.curve, state)
            curve[step], done = float(loss), done + 1
            frozen.append(int(still))
            try:
                step, state = rollback.step(step + 1, state) if rollback else (step + 1, state)
            except GuardExhausted:
                ended = True
        reasons = [r.reason for r in rollback.history] if rollback else []
    found = lbw_optax.metrics(state[1]) if method.guarded else {}
    return Run(
        final=float(_loss(state[0], text.final["test"])),
        curve=curve,
        steps_done=done,
        frozen=sum(frozen),
        freezes=_begun(frozen),
        skips=int(found.get("skips", 0)),
        rollbacks=reasons,
        ended=ended or bool(found.get("exhausted", False)),
        clips=int(optax.tree.get(state[1], "qk_clips", default=0)),
    )


@contextlib.contextmanager
def _manager(wanted: bool) -> Iterator[RollbackManager | None]:
    if not wanted:
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
        # By steps and not by the clock, so that every machine goes back to the same one.
        RollbackManager(folder, snapshot_every=7) as rollback,
    ):
        yield rollback


@functools.cache
def _optimizer(method: str, rate: float) -> optax.GradientTransformationExtraArgs:
    bare = optax.adamw(faults.schedule(rate))
    if not METHODS[method].guarded:
        return optax.with_extra_args_support(bare)
    guarded = lbw_guard(bare, groups=by_layer if METHODS[method].freezes else None)
    return optax.chain(guarded, lbw_optax.qk_clip()) if METHODS[method].clips else guarded


def _step(method: str, rate: float, code: Any, tokens: Any, curve: Any, state: Any) -> Any:
    named = METHODS[method]
    kind = named.guarded, named.freezes, named.clips
    return _compiled(kind, rate)(code, tokens, curve, state)


@functools.cache
def _compiled(kind: tuple[bool, bool, bool], rate: float) -> Callable[..., Any]:
    """One step with a fault or without: state, held-out loss, and how many groups are frozen."""
    kinds = {name: (m.guarded, m.freezes, m.clips) for name, m in METHODS.items()}
    name = next(name for name, own in kinds.items() if own == kind)
    tx, (guarded, _, clips) = _optimizer(name, rate), kind

    @jax.jit
    def step(code: jax.Array, tokens: jax.Array, curve: jax.Array, state: Any) -> Any:
        params, opt_state = state
        struck = {name: code == i for i, name in enumerate(FAULTS)}
        params = _times(params, r"", jnp.where(struck["weights"], 10.0, 1.0))
        params = _times(params, "[qk]_proj", jnp.where(struck["logits"], GROWTH, 1.0))
        opt_state = _without_moment(opt_state, struck["moment"])
        if clips:
            found, grads = jax.value_and_grad(_watched, has_aux=True)(params, tokens)
            loss, given = found[0], {"activations": found[1]}
        else:
            loss, grads = jax.value_and_grad(_loss)(params, tokens)
            given = {}
        grads = _times(grads, "down_proj", jnp.where(struck["nan"], jnp.nan, 1.0))
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, **given)
        params = optax.apply_updates(params, updates)
        frozen = lbw_optax.metrics(opt_state)["frozen_groups"] if guarded else jnp.int32(0)
        return (params, opt_state), _loss(params, curve), frozen

    return step


def _times(tree: Any, name: str, factor: jax.Array) -> Any:
    """The leaves of the layer whose path has this in it times a factor, of 1 to the bit."""

    def act(path: Any, x: jax.Array) -> jax.Array:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        hit = f"layers/{LAYER}/" in where and (not name or _has(where, name))
        return jnp.where(factor == 1, x, x * factor) if hit else x

    return jax.tree_util.tree_map_with_path(act, tree)


def _has(path: str, name: str) -> bool:
    names = [name.replace("[qk]", letter) for letter in "qk"]
    return any(f"/{x}/" in path for x in names)


def _without_moment(opt_state: Any, lost: jax.Array) -> Any:
    """Adam's second moment of the layer is zero."""

    def act(path: Any, x: jax.Array) -> jax.Array:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        hit = "nu/" in where and f"layers/{LAYER}/" in where
        return jnp.where(lost, jnp.zeros_like(x), x) if hit else x

    return jax.tree_util.tree_map_with_path(act, opt_state)


@functools.cache
def _split(seed: int) -> tuple[Any, Any, Any]:
    return model.split(model.Decoder(CONFIG, rngs=nnx.Rngs(seed)))


@jax.jit
def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    graphdef, _, rest = _split(0)
    decoder = nnx.merge(graphdef, params, rest)
    return model.cross_entropy(decoder(tokens[:, :-1]), tokens[:, 1:])


def _watched(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """The loss, and what the layers show of themselves."""
    graphdef, _, rest = _split(0)
    return model.next_token_loss(graphdef, watched=True)(params, rest, tokens)


def _smoothed(curve: np.ndarray) -> np.ndarray:
    """The mean of the last `SMOOTHED` entries, or of as many as there are, every tenth step."""
    ends = range(10, STEPS + 1, 10)
    return np.array([np.mean(curve[max(0, end - SMOOTHED) : end]) for end in ends])


def _begun(counts: Sequence[int]) -> int:
    """How many groups were frozen anew, of the numbers frozen after each step.

    >>> _begun([0, 1, 1, 0, 2])
    3
    """
    return int(np.maximum(np.diff([0, *counts]), 0).sum())


# Sound tasks of the health benchmark


def _sound(cell: Cell) -> Record:
    """A run of a health task, each leaf a group: how often one is frozen."""
    task = tasks()[cell["task"]]
    models, each = jax.device_get(_trained(cell["task"], jax.random.key(cell["seed"])))
    return {
        "metric": jsonl.finite(float(f"{float(task.metric(models)):.6g}")),
        "groups": sum(len(jax.tree.leaves(models[name])) for name in task.losses),
        "frozen": int(each.sum()),
        "freezes": sum(_begun(list(counts)) for counts in each.T),
    }


@functools.partial(jax.jit, static_argnums=0)
def _trained(name: str, key: jax.Array) -> tuple[Any, jax.Array]:
    """The models after a whole run, and how many groups of each were frozen after each step."""
    task = tasks()[name]
    inner = optax.with_extra_args_support(task.optimizer(task.rate))
    tx = lbw_guard(inner, groups=_leaf, max_frozen=0.5)
    models = jax.tree.map(jnp.array, task.start(jax.random.fold_in(key, 2**31 - 1)))
    states = {name: tx.init(models[name]) for name in task.losses}

    def step(carry: Any, batch: jax.Array) -> tuple[Any, Any]:
        models, states, memory = carry
        now = Now(batch, batch, jax.random.fold_in(key, batch), memory)
        models, states = dict(models), dict(states)
        frozen = []
        for name, loss in task.losses.items():
            value, grads = jax.value_and_grad(loss)(models[name], models, now)
            updates, states[name] = tx.update(grads, states[name], models[name], value=value)
            models[name] = optax.apply_updates(models[name], updates)
            frozen.append(lbw_optax.metrics(states[name])["frozen_groups"])
        memory = task.remember(memory, models, batch + 1)
        return (models, states, memory), jnp.stack(frozen)

    batches = jnp.arange(task.steps, dtype=jnp.int32)
    carry = (models, states, task.memory(models))
    (models, _, _), counts = jax.lax.scan(step, carry, batches)
    return models, counts


def _leaf(path: str) -> str:
    return path


def _line(record: Record) -> str:
    if "task" in record:
        run = f"{record['task']}, seed {record['seed']}"
        return f"{run}: {record['freezes']} freezes, {record['frozen']} group-steps"
    run = f"{record['method']}, rate {record['rate']:g}, {record['fault']}, seed {record['seed']}"
    return f"{run}: loss {record['loss']}, {record['freezes']} freezes, {record['rollbacks']}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freezing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data-dir", help="holds train.txt, valid.txt, test.txt; default: the embedded corpus")
    add("--parts", nargs="+", default=list(PARTS), metavar="NAME", help=" ".join(PARTS))
    add("--seeds", nargs="+", type=int, metavar="N", help="default: 0 to 2")
    add("--quick", action="store_true", help="one seed")
    add("--out", type=Path, help=out_help(RESULTS))
    options = parser.parse_args(arguments)
    options.out = options.out or (quick(RESULTS) if options.quick else RESULTS)
    options.seeds = options.seeds or (SEEDS[:1] if options.quick else list(SEEDS))
    check_names(options.parts, PARTS, "part")
    return options


if __name__ == "__main__":
    main()

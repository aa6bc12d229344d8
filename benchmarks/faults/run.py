"""One training run with faults in it: a compiled step, run in stretches of `STRETCH` steps.

One program serves every fault, because what strikes in a step is data: the batch (with the data's
faults in it), a code for the faults inside of the step, and a table of learning rates. Seeds run
one after the other: under `vmap` they were no faster on a CPU (1.6 against 1.4 ms a step), and
what strikes in one of them would be computed for all.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lbw_optax
from benchmarks.faults.measures import Trace
from lbw_optax.testing import KINDS, Fault
from train import data, model

CONFIG = model.Config(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
BATCH, LENGTH, WARMUP = 8, 32, 20
STRETCH = 50
"""Steps that are compiled as one: the length of a run is a multiple of it."""
LONGEST = 10_000
"""Steps of the longest run; every table of learning rates is as long, so that one program does."""
CURVE_ROWS, FINAL_ROWS = 8, 128
"""Held-out sequences behind the loss after every step, and behind the final loss."""

IN_DATA = ("random_tokens", "one_token", "shifted_labels", "false_alarm", "stealth")
"""Kinds that stay with their batch: whoever sees it again, after a rollback say, is hit again."""
PLACES = {
    "params": ("flipped_parameter",),
    "opt_state": ("flipped_mu", "flipped_nu"),
    "activations": ("nan_activation",),
    "gradients": (
        "nan_loss",
        "inf_loss",
        "nan_gradient",
        "inf_gradient",
        "scaled_gradient",
        "level_shift",
        "false_alarm",
        "stealth",
    ),
}
CODES = {kind: code for code, kind in enumerate(KINDS)}

Method = Callable[[optax.Schedule], optax.GradientTransformation]


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens to train on, and held-out windows, int32[rows, LENGTH + 1]."""

    train: np.ndarray
    curve: np.ndarray  # of valid
    final: dict[str, np.ndarray]  # of valid and test


class Strike(NamedTuple):
    """What strikes inside of a step; arrays with one entry a step."""

    code: Any  # index into KINDS
    size: Any
    seed: Any


class Inputs(NamedTuple):
    """All that one step is given but its state; arrays with one entry a step."""

    clock: Any  # steps done so far, whatever became of them
    strike: Strike
    inputs: Any
    targets: Any


class State(NamedTuple):
    params: Any
    opt_state: Any


def load(directory: Any) -> Text:
    """Tokens of the corpus in this directory; None takes the embedded one."""
    corpus = data.load(directory, vocab_size=CONFIG.vocab_size)

    def rows(split: np.ndarray, count: int) -> np.ndarray:
        found = data.windows(split, batch_size=1, length=LENGTH)[:-1, 0]
        return found[:: len(found) // count][:count]

    final = {"valid": rows(corpus.valid, FINAL_ROWS), "test": rows(corpus.test, FINAL_ROWS)}
    return Text(np.asarray(corpus.train), final["valid"][:: FINAL_ROWS // CURVE_ROWS], final)


def facts(text: Text) -> dict[str, Any]:
    """What a record says of data and model; a digest stands for the tokens themselves."""
    digest = hashlib.sha256(text.train.tobytes())
    for rows in text.final.values():
        digest.update(rows.tobytes())
    return {
        "tokens": digest.hexdigest()[:16],
        "model": {name: getattr(CONFIG, name) for name in _SHAPE},
        "length": LENGTH,
        "batch_size": BATCH,
    }


def about(directory: Any) -> dict[str, Any]:
    """What a record says of its run besides, and that decides no number."""
    return {"data": "standard library" if directory is None else Path(directory).name}


_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def schedule(rate: float) -> optax.Schedule:
    """A short warm-up, then constant: a run may be continued to any length."""
    return lambda count: rate * jnp.minimum(1.0, (count + 1) / WARMUP)


def learning_rates(rate: float, faults: Sequence[Fault]) -> np.ndarray:
    """The rate for each count of the optimizer, float32[LONGEST]."""
    faulty = functools.reduce(
        lambda healthy, fault: fault.schedule(healthy), faults, schedule(rate)
    )
    return np.asarray(jax.vmap(faulty)(jnp.arange(LONGEST)), np.float32)


def inputs_of(text: Text, seed: int, faults: Sequence[Fault], clock: int, position: int) -> Inputs:
    """What the step at this clock and data position is given; both count from 0."""
    tokens = data.sample(text.train, seed, position, batch_size=BATCH, length=LENGTH)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    strike = Strike(np.int32(0), np.float32(0), np.int32(0))
    for fault in faults:
        step = position if fault.kind in IN_DATA else clock
        if strikes(fault, step):
            strike = Strike(
                np.int32(CODES[fault.kind]), np.float32(fault.size), np.int32(fault.seed)
            )
            if fault.kind in IN_DATA:
                inputs, targets = _batch(fault, step, inputs, targets)
    return Inputs(np.int32(clock), strike, np.asarray(inputs), np.asarray(targets))


def strikes(fault: Fault, step: int) -> bool:
    """As `Fault.active`, without a device."""
    since = step - fault.at
    return 0 <= since < fault.length and since % KINDS[fault.kind].every == 0


@jax.jit
def _batch(fault: Fault, step: Any, inputs: Any, targets: Any) -> Any:
    return fault.batch(step, inputs, targets, CONFIG.vocab_size)


def start(method: Method, seed: int) -> State:
    """Parameters and optimizer state before the first step."""
    _, params, _ = model.split(model.Decoder(CONFIG, rngs=nnx.Rngs(seed)))
    return State(params, _optimizer(method, jnp.ones(1)).init(params))


def run(
    text: Text,
    method: Method,
    seed: int,
    rates: np.ndarray,
    faults: Sequence[Fault],
    state: State,
    first: int,
    last: int,
) -> tuple[State, Trace]:
    """The steps first, ..., last - 1 of a run, with what was seen in each of them.

    A run whose loss and state are no numbers stays so, and is not computed to its end.
    """
    parts: list[Trace] = []
    for begin in range(first, last, STRETCH):
        clock = range(begin, begin + STRETCH)
        if parts and np.isnan(parts[-1].loss[-1]) and parts[-1].nonfinite[-1]:
            end = jax.tree.map(lambda x: np.repeat(x[-1:], STRETCH), parts[-1])
            parts.append(end._replace(step=np.array(clock)))
            continue
        given = [inputs_of(text, seed, faults, i, i) for i in clock]
        stacked = jax.tree.map(lambda *x: np.stack(x), *given)
        state, seen = _stretch(method, stacked, rates, text.curve, state)
        parts.append(jax.device_get(seen))
    return state, join(parts)


def join(parts: Sequence[Trace]) -> Trace:
    """Traces one after the other."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.partial(jax.jit, static_argnums=0)
def _stretch(method: Method, given: Inputs, rates: Any, curve: Any, state: State) -> Any:
    step = functools.partial(_step, method, rates, curve)
    return jax.lax.scan(step, state, given)


@functools.partial(jax.jit, static_argnums=0)
def one_step(method: Method, rates: Any, curve: Any, state: State, given: Inputs) -> Any:
    """The same step, for a loop on the host."""
    return _step(method, rates, curve, state, given)


def _step(
    method: Method, rates: Any, curve: Any, state: State, given: Inputs
) -> tuple[State, Trace]:
    clock, strike = given.clock, given.strike
    params = _inject("params", clock, strike, state.params)
    opt_state = _inject("opt_state", clock, strike, state.opt_state)

    def loss_fn(params: Any) -> jax.Array:
        corrupt = functools.partial(_inject, "activations", clock, strike)
        return _loss(params, given.inputs, given.targets, corrupt)

    loss, grads = _inject("gradients", clock, strike, *jax.value_and_grad(loss_fn)(params))
    updates, opt_state = _optimizer(method, rates).update(grads, opt_state, params, value=loss)
    moved = optax.apply_updates(params, updates)
    seen = Trace(
        step=given.clock,
        loss=_loss(moved, curve[:, :-1], curve[:, 1:]),
        still=_all(jax.tree.map(lambda x, y: jnp.all(x == y), params, moved)),
        nonfinite=~_all(jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), (moved, opt_state))),
        guard=_watch(opt_state),
    )
    return State(moved, opt_state), seen


def _inject(place: str, step: Any, strike: Strike, *values: Any) -> Any:
    """Let this step's fault act in this place, if it is one that does."""
    kinds = ("none", *PLACES[place])
    faults = [Fault(kind, step, 1, strike.size, strike.seed) for kind in kinds]
    branches = [functools.partial(getattr(fault, place), step) for fault in faults]
    index = jnp.argmax(jnp.array([CODES[kind] for kind in kinds]) == strike.code)
    return jax.lax.switch(index, branches, *values)


def _loss(
    params: Any, inputs: jax.Array, targets: jax.Array, corrupt: Callable[[Any], Any] | None = None
) -> jax.Array:
    """Cross-entropy in nats; `corrupt` acts on what the first MLP gives."""
    decoder = nnx.merge(*_structure(), params)
    if corrupt is not None:
        mlp = decoder.layers[0].mlp
        decoder.layers[0].mlp = lambda *x: corrupt(mlp(*x))
    return model.cross_entropy(decoder(inputs), targets)


@functools.cache
def _structure() -> tuple[Any, Any]:
    graphdef, _, rest = model.split(model.Decoder(CONFIG, rngs=nnx.Rngs(0)))
    return graphdef, rest


def _optimizer(method: Method, rates: Any) -> optax.GradientTransformationExtraArgs:
    table = jnp.asarray(rates)
    return optax.with_extra_args_support(method(lambda count: table[count]))


def final_loss(text: Text, params: Any) -> dict[str, float]:
    """Mean loss on held-out rows of both splits, in nats."""
    return {split: float(_evaluate(params, rows)) for split, rows in text.final.items()}


@jax.jit
def _evaluate(params: Any, rows: jax.Array) -> jax.Array:
    return _loss(params, rows[:, :-1], rows[:, 1:])


def _all(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack(jax.tree.leaves(tree)))


def _watch(opt_state: Any) -> dict[str, jax.Array]:
    try:
        found = lbw_optax.metrics(opt_state)
    except ValueError:  # no guard in this state
        return {}
    return {name: found[name] for name in ("scale", "regime", "skips", "events", "exhausted")}

"""Faults to put into a training run on purpose, to see whether it survives them.

A `Fault` has one method for each place of a training step where something can go wrong. Each takes
the step and what passes there, and gives it back: changed if the fault is of that place and the
step is one of its own, else as it was, to the bit. All are pure and work under ``jit``, ``scan``
and ``vmap``; the same fault at the same step does the same damage.
"""

import difflib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lbw_optax.types import PyTree

FOREVER = 2**31 - 1
"""As a length: the fault does not end."""


class Kind(NamedTuple):
    """What a kind of fault does, how large it is, and how long, unless said otherwise."""

    what: str
    size: float = 0.0
    length: int = 1
    every: int = 1  # it strikes in every so many of its steps


KINDS = {
    "none": Kind("nothing"),
    "nan_loss": Kind("the loss is NaN, the gradients are not"),
    "inf_loss": Kind("the loss is infinite, the gradients are not"),
    "nan_gradient": Kind("one leaf of the gradients is NaN"),
    "inf_gradient": Kind("one leaf of the gradients is infinite"),
    "nan_activation": Kind("one activation is NaN"),
    "random_tokens": Kind("all tokens of the batch are random"),
    "one_token": Kind("all tokens of the batch are the same one"),
    "shifted_labels": Kind("targets are one position late: each is its own input"),
    "scaled_gradient": Kind("the gradients are multiplied by size", 1e3),
    "flipped_parameter": Kind("bit size of one parameter; 0 is the sign, then the exponent", 1),
    "flipped_mu": Kind("bit size of one element of Adam's first moment", 1),
    "flipped_nu": Kind("bit size of one element of Adam's second moment", 1),
    "learning_rate": Kind("the learning rate is multiplied by size", 100, 10),
    "drift": Kind("the learning rate grows by the factor size every step", 1.05, 100),
    "level_shift": Kind("loss and gradients are multiplied by size, for good", 25, FOREVER),
    "false_alarm": Kind(
        "an adversary weighs good batches so that they look bad: loss and gradients times size",
        size=20,
        length=100,
        every=10,
    ),
    "stealth": Kind(
        "an adversary hides: a quarter of the rows is random, the gradients are times size",
        size=5,
        length=100,
        every=4,
    ),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["at", "length", "size", "seed"],
    meta_fields=["kind"],
)
@dataclass(frozen=True)
class Fault:
    """One fault: what goes wrong, in which steps, and how badly.

    Put it where it belongs; a method that does not concern the kind gives its input back::

        tx = lbw_guard(optax.adamw(fault.schedule(1e-3)))
        params = fault.params(step, params)
        opt_state = fault.opt_state(step, opt_state)
        inputs, targets = fault.batch(step, inputs, targets, vocab_size)
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets)
        loss, grads = fault.gradients(step, loss, grads)

    and ``x = fault.activations(step, x)`` inside the model. All but `kind` may be traced.

    Attributes:
      kind: a name in `KINDS`.
      at: the first step in which it strikes, counted from 0.
      length: how many steps it lasts; None takes the kind's own.
      size: how large it is; see `KINDS`. None takes the kind's own.
      seed: decides which leaf, element or token.

    Raises:
      ValueError: if there is no such kind; if the optimizer state holds no moments to flip a bit
        in.

    Example:
      >>> import jax.numpy as jnp
      >>> from lbw_optax.testing import Fault
      >>> fault = Fault("scaled_gradient", at=3, size=1e3)
      >>> [float(fault.gradients(step, 0.5, jnp.ones(()))[1]) for step in (2, 3, 4)]
      [1.0, 1000.0, 1.0]
    """

    kind: str
    at: Any
    length: Any = None
    size: Any = None
    seed: Any = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=3, cutoff=0.4) or list(KINDS)
            raise ValueError(f"There is no fault {self.kind!r}: did you mean {' or '.join(near)}?")
        for name in ("length", "size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(KINDS[self.kind], name))

    def active(self, step: ArrayLike) -> jax.Array:
        """Whether it strikes in this step: bool scalar."""
        since = jnp.asarray(step) - self.at
        return (since >= 0) & (since < self.length) & (since % KINDS[self.kind].every == 0)

    def batch(
        self, step: ArrayLike, inputs: jax.Array, targets: jax.Array, vocab_size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens and the tokens to predict, int32[batch, length] each; targets[t] = inputs[t+1]."""
        rows, length = inputs.shape
        key, strikes = self._key(step), self.active(step)
        draw = functools.partial(jax.random.randint, key, minval=0, maxval=vocab_size)
        match self.kind:
            case "shifted_labels":
                return inputs, jnp.where(strikes, inputs, targets)
            case "one_token":
                bad, replaced = draw((1, 1)), rows
            case "random_tokens":
                bad, replaced = draw((rows, length + 1)), rows
            case "stealth":
                bad, replaced = draw((rows, length + 1)), -(-rows // 4)
            case _:
                return inputs, targets
        bad = jnp.broadcast_to(bad, (rows, length + 1)).astype(inputs.dtype)
        hit = strikes & (jnp.arange(rows) < replaced)[:, None]
        return jnp.where(hit, bad[:, :-1], inputs), jnp.where(hit, bad[:, 1:], targets)

    def activations(self, step: ArrayLike, x: jax.Array) -> jax.Array:
        """Activations of any shape, inside the model: one element turns NaN, its gradient too."""
        if self.kind != "nan_activation":
            return x
        strikes, ones = self.active(step), jnp.ones_like(x)
        # A product, for the gradient of what is merely replaced would be zero.
        return x * _change_one(ones, strikes, self._key(step), lambda x: x * jnp.nan)

    def gradients(
        self, step: ArrayLike, loss: ArrayLike, grads: PyTree
    ) -> tuple[ArrayLike, PyTree]:
        """Loss and gradients, after they were computed and before the optimizer sees them."""
        strikes = self.active(step)
        value = jnp.nan if self.kind.startswith("nan") else jnp.inf
        match self.kind:
            case "nan_loss" | "inf_loss":
                loss = jnp.where(strikes, jnp.asarray(value, jnp.result_type(loss)), loss)
            case "nan_gradient" | "inf_gradient":
                grads = _fill_leaf(grads, strikes, self._key(step), value)
            case "scaled_gradient" | "stealth":
                grads = self._scaled(strikes, grads)
            case "level_shift" | "false_alarm":
                loss, grads = self._scaled(strikes, (loss, grads))
        return loss, grads

    def params(self, step: ArrayLike, params: PyTree) -> PyTree:
        """The parameters, before the step uses them."""
        if self.kind != "flipped_parameter":
            return params
        return _flip_one(params, self.active(step), self._key(step), self.size)

    def opt_state(self, step: ArrayLike, opt_state: PyTree) -> PyTree:
        """The optimizer state, before the step uses it; Adam's moments may lie anywhere in it."""
        if self.kind not in ("flipped_mu", "flipped_nu"):
            return opt_state
        name, strikes = self.kind.removeprefix("flipped_"), self.active(step)
        moments = [n for n in jax.tree.leaves(opt_state, is_leaf=_has_moments) if _has_moments(n)]
        if not moments:
            raise ValueError(f"This optimizer state has no {name}: flip bits in that of an Adam.")

        def visit(node: PyTree) -> PyTree:
            if not _has_moments(node):
                return node
            old = getattr(node, name)
            return node._replace(**{name: _flip_one(old, strikes, self._key(step), self.size)})

        return jax.tree.map(visit, opt_state, is_leaf=_has_moments)

    def schedule(self, learning_rate: optax.ScalarOrSchedule) -> optax.Schedule:
        """A constant or an Optax schedule, with the fault in it; `step` is the schedule's count."""
        healthy = learning_rate if callable(learning_rate) else lambda count: learning_rate

        def schedule(count: ArrayLike) -> ArrayLike:
            since = jnp.asarray(count) - self.at
            match self.kind:
                case "learning_rate":
                    factor = self.size
                case "drift":
                    factor = self.size ** (since + 1.0)
                case _:
                    return healthy(count)
            rate = jnp.asarray(healthy(count), jnp.float32)
            return jnp.where(self.active(count), rate * factor, rate)

        return schedule

    def _key(self, step: ArrayLike) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def _scaled(self, strikes: jax.Array, tree: PyTree) -> PyTree:
        def scale(x: ArrayLike) -> jax.Array:
            wide = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
            return jnp.where(strikes, (wide * self.size).astype(jnp.result_type(x)), x)

        return jax.tree.map(scale, tree)


def _fill_leaf(tree: PyTree, strikes: jax.Array, key: jax.Array, value: float) -> PyTree:
    """One leaf of the tree, all of it, takes this value."""

    def fill(leaves: list[jax.Array]) -> list[jax.Array]:
        chosen = jax.random.randint(key, (), 0, len(leaves))
        return [
            jnp.where(strikes & (chosen == i), jnp.asarray(value, leaf.dtype), leaf)
            for i, leaf in enumerate(leaves)
        ]

    return _change_floats(tree, fill)


def _flip_one(tree: PyTree, strikes: jax.Array, key: jax.Array, bit: ArrayLike) -> PyTree:
    """One bit of one element; bits are counted from the sign, which is 0, downwards."""

    def flip(x: jax.Array) -> jax.Array:
        width = 8 * x.dtype.itemsize
        whole = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
        place = jnp.asarray(width - 1 - bit).astype(whole.dtype)
        return jax.lax.bitcast_convert_type(whole ^ (jnp.ones_like(whole) << place), x.dtype)

    return _change_one(tree, strikes, key, flip)


def _change_one(
    tree: PyTree, strikes: jax.Array, key: jax.Array, change: Callable[[jax.Array], jax.Array]
) -> PyTree:
    """One element of the whole tree, every one as likely as any other."""

    def change_leaves(leaves: list[jax.Array]) -> list[jax.Array]:
        chosen = jax.random.randint(key, (), 0, sum(leaf.size for leaf in leaves))
        ends = itertools.accumulate(leaf.size for leaf in leaves)
        changed = []
        for leaf, end in zip(leaves, ends, strict=True):
            place = chosen - (end - leaf.size)
            hit = strikes & (place >= 0) & (place < leaf.size)
            flat, place = leaf.reshape(-1), jnp.clip(place, 0, leaf.size - 1)
            new = jnp.where(hit, change(flat[place]), flat[place])
            changed.append(flat.at[place].set(new).reshape(leaf.shape))
        return changed

    return _change_floats(tree, change_leaves)


def _change_floats(tree: PyTree, change: Callable[[list[jax.Array]], list[jax.Array]]) -> PyTree:
    """The tree with its leaves of real numbers changed; integers and empty leaves stay."""
    leaves, structure = jax.tree.flatten(tree)
    places = [
        i for i, leaf in enumerate(leaves) if leaf.size and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    for i, new in zip(places, change([jnp.asarray(leaves[i]) for i in places]), strict=True):
        leaves[i] = new
    return jax.tree.unflatten(structure, leaves)


def _has_moments(node: PyTree) -> bool:
    return hasattr(node, "mu") and hasattr(node, "nu") and hasattr(node, "_replace")

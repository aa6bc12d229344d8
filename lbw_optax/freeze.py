"""The groups that a guard may freeze: from decisions to gradients, states and steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lbw_optax import groups
from lbw_optax.groups import Grouping, Groups
from lbw_optax.law import freezing
from lbw_optax.law.freezing import Freezing, Limits
from lbw_optax.law.telemetry import Lengths
from lbw_optax.names import decoded, encoded
from lbw_optax.types import PyTree


class Arrived(NamedTuple):
    """What is known before the optimizer runs."""

    groups: Groups
    squares: jax.Array  # float32[G], of the gradients
    of_leaves: jax.Array  # float32[leaves], of those that are left
    state: Freezing
    frozen: jax.Array  # bool[G], of which the optimizer sees no gradient and keeps the state
    governing: jax.Array  # bool scalar


class Freeze(NamedTuple):
    """What a user wants frozen; `lbw_guard` has looked at it."""

    grouping: Grouping
    limits: Limits

    def names(self, params: PyTree) -> list[str]:
        """Of the groups of these parameters.

        Raises:
          ValueError: if there are fewer than two, or so few that none may be frozen.
        """
        names = groups.find(self.grouping, params).names
        if not jax.tree.leaves(params):  # as `optax.tree_map_params` asks what a state is made of
            return names
        if len(names) < 2:
            raise ValueError(
                f"groups makes {len(names)} of these parameters, {names}, and nothing would be "
                "left to train: give at least two names, as lbw_optax.by_layer does for layers."
            )
        share = self.limits.max_frozen
        if not isinstance(share, jax.core.Tracer) and not freezing.most(len(names), self.limits):
            raise ValueError(
                f"max_frozen={share!r} of {len(names)} groups is less than one, and none would "
                f"ever be frozen: {1 / len(names):.3g} is the least that freezes one."
            )
        return names

    def arrive(
        self, state: Freezing | tuple[()], gradients: PyTree, given: PyTree, governing: jax.Array
    ) -> tuple[Arrived, PyTree, PyTree]:
        """Decide by the gradients, and leave those of frozen groups out.

        Args:
          state: after the step before.
          gradients: that count.
          given: the same for the optimizer.
          governing: bool scalar; else nothing is left out.
        """
        found = groups.find(self.grouping, gradients)
        wanted = encoded(found.names).shape
        if not isinstance(state, Freezing) or state.names.shape != wanted:
            raise ValueError(
                f"The gradients make {len(found.names)} groups{_some(found.names)} and this state "
                f"was made with {_known(state)}: make it with tx.init of this optimizer and these "
                "parameters, or keep the optimizer's own, "
                "lbw_optax.adopt(tx.init(params), lbw_optax.strip(state))."
            )
        state = freezing.named(state, found.names)
        sums = groups.squares(found, gradients)
        squares, rest = sums.of_groups(len(found.names))
        new = freezing.arrive(state, squares, rest, self.limits)
        frozen = new.frozen & governing
        left = sums.held(frozen).of_leaves()
        arrived = Arrived(found, squares, left, new, frozen, governing)
        zeroed = [groups.zeroed(found, tree, arrived.frozen) for tree in (gradients, given)]
        return arrived, *zeroed

    def keep(self, arrived: Arrived, old: PyTree, new: PyTree, gradients: PyTree) -> PyTree:
        """The inner state after the step, with the old one's share of the frozen groups."""
        return groups.kept(arrived.groups, old, new, gradients, arrived.frozen)

    def propose(
        self, arrived: Arrived, updates: PyTree, params: PyTree, refused: jax.Array
    ) -> tuple[Freezing, PyTree, Lengths]:
        """Decide by the updates, too, and leave those of frozen groups out."""
        found, number = arrived.groups, len(arrived.groups.names)
        proposed = groups.squares(found, updates)
        step, _ = proposed.of_groups(number)
        there = None if params is None else groups.squares(found, params)
        length = jnp.zeros_like(step) if there is None else there.of_groups(number)[0]
        new = freezing.propose(arrived.state, arrived.squares, step, length, refused, self.limits)
        frozen = new.frozen & arrived.governing
        log_scale = jnp.where(arrived.governing, new.log_thaw, 0.0)
        left = proposed.held(frozen, log_scale).of_leaves()
        lengths = Lengths(left, None if there is None else there.of_leaves())
        return new, groups.held(found, updates, frozen, log_scale), lengths


def _known(state: Freezing | tuple[()]) -> str:
    """The groups of a state, as far as they can be told."""
    if not isinstance(state, Freezing):
        return "0"
    if isinstance(state.names, jax.core.Tracer):
        return str(state.frozen.size)
    return str(decoded(state.names))


def _some(names: list[str]) -> str:
    return f", {names}," if len(names) <= 8 else ","

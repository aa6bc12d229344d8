"""What a person asks of a run that is under way, through a file in its directory.

`lbw-watch` writes the file; the run reads it between two steps. Nothing else is needed between the
two: no port, no signal, and it works over any file system that both can see.
"""

import getpass
import itertools
import json
import logging
import os
import socket
import warnings
from datetime import UTC, datetime
from io import FileIO
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lbw_optax import audit
from lbw_optax.lines import Lines, is_torn
from lbw_optax.paths import path_of
from lbw_optax.types import PyTree

_LOG = logging.getLogger("lbw_optax")
FILE = "orders.jsonl"
ORDERS = ("hold", "release", "observe", "govern", "reset", "rollback")
# Steps between two looks at the file where several processes must look together.
EVERY = 10
# The least scale that float32 can hold.
LEAST = float(np.finfo(np.float32).tiny)


class Order(NamedTuple):
    """One line of the file.

    Attributes:
      order: one of ``ORDERS``.
      scale: of "hold": where to, in (0, 1]; None: where it is.
      who: user and host that gave it.
      time: when, ISO 8601 in UTC.
    """

    order: str
    scale: float | None
    who: str
    time: str


class Rollbacks(Protocol):
    """Of a `RollbackManager` what an order needs."""

    def request(self, reason: str) -> None: ...


def give(directory: str | os.PathLike[str], order: str, scale: float | None = None) -> Order:
    """Write an order for the run in this directory; it obeys within ten steps.

    - ``hold``: pins the scale, at `scale` or where it is; ``release`` gives it back to the law.
    - ``observe``: the guard only looks on; ``govern`` lets it act again.
    - ``reset``: an exhausted guard goes on.
    - ``rollback``: goes back to the last proven state, where a `RollbackManager` is at work.

    Raises:
      ValueError: for another order, or a scale that is not in (0, 1] or not for "hold".
      OSError: if the file cannot be written.

    Example:
      >>> import tempfile
      >>> give(tempfile.mkdtemp(), "hold", 0.1).order
      'hold'
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
    if scale is not None and not (order == "hold" and _is_scale(scale)):
        raise ValueError(f'scale must be in (0, 1], and is for "hold" only; got {scale!r}.')
    pinned = None if scale is None else float(scale)
    given = Order(order, pinned, _who(), datetime.now(UTC).isoformat(timespec="seconds"))
    line = (json.dumps(given._asdict()) + "\n").encode()
    # One write of a short line to a file that is only appended to: orders of two people stay whole.
    with FileIO(path_of(directory, "directory") / FILE, "a+") as file:
        line = b"\n" * is_torn(file) + line
        if file.write(line) != len(line):
            raise OSError(28, "has no room for an order: free space there", str(file.name))
    return given


class Orders:
    """Obeys what is asked in this directory from now on.

    What was asked before it was made is of an earlier process, and passed over. So is a line that
    is no order, with a warning, once. A file that cannot be read is a warning, and ends no run.

    Args:
      directory: of the run; it need not exist yet. With several processes all of them must see it,
        or the first: what that one reads goes for all.

    Example:
      >>> import jax.numpy as jnp, tempfile, lbw_optax
      >>> place = tempfile.mkdtemp()
      >>> state, orders = lbw_optax.adamw(1e-3).init(jnp.ones(3)), Orders(place)
      >>> _ = give(place, "hold", 0.5)
      >>> state = orders.obey(state, 1)
      >>> print(lbw_optax.metrics(state)["scale"])
      0.5
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._lines = Lines(path_of(directory, "directory") / FILE)
        self._heard: list[bytes] | None = None  # None: not even what is of an earlier process
        self._restarts = 0
        self._told: set[str] = set()
        self._read_on()

    def obey(
        self,
        state: PyTree,
        step: int,
        *,
        log: "audit.AuditLog | None" = None,
        rollbacks: Rollbacks | None = None,
    ) -> PyTree:
        """The state after the orders that have come in; most of the time, the state as it is.

        It costs a look at the size of a file. Call it after every step, on all processes.

        Args:
          state: any state that holds a guard.
          step: of the loop, for the log.
          log: where each order is written, with who gave it and when.
          rollbacks: is asked for a rollback, which its next `step` makes.
        """
        for order in self._news(step):
            state = _obeyed(state, order, rollbacks)
            if log is not None:
                log.note(step, action="order", step=step, **order._asdict())
        return state

    def _news(self, step: int) -> list[Order]:
        """What has come in; with several processes, what the first has read, every ten steps."""
        if jax.process_count() == 1:
            return self._read_on()
        if step % EVERY:
            return []
        from jax.experimental import multihost_utils

        mine = _packed(self._read_on() if jax.process_index() == 0 else [])
        length = multihost_utils.broadcast_one_to_all(np.int32(len(mine)))
        padded = np.zeros(int(length), np.uint8)
        padded[: len(mine)] = mine[: int(length)]
        return _unpacked(np.asarray(multihost_utils.broadcast_one_to_all(padded)))

    def _read_on(self) -> list[Order]:
        """The orders since the last look; of a file that is another one, since they differ."""
        try:
            lines = self._lines.new()
        except OSError as error:
            self._warn(
                f"{self._lines.path} cannot be read ({error.strerror}): no order is heard until it "
                "is a file that this user may read."
            )
            return []
        heard, self._heard = self._heard, [*(self._heard or []), *lines]
        if heard is None:
            return []
        if self._lines.restarts > self._restarts:
            self._restarts, self._heard = self._lines.restarts, lines
            same = (a == b for a, b in zip(heard, lines, strict=False))
            lines = lines[sum(itertools.takewhile(bool, same)) :]
        return [order for line in lines if line.strip() and (order := self._order(line))]

    def _order(self, line: bytes) -> Order | None:
        order = _order(line)
        if order is None:
            self._warn(
                f"{self._lines.path} has a line that is no order and is passed over "
                f"({line[:80]!r}): give orders with lbw-watch, or lbw_optax.orders.give."
            )
        return order

    def _warn(self, message: str) -> None:
        """Once of each kind."""
        kind = message.partition("(")[0]
        if kind not in self._told:
            self._told.add(kind)
            _LOG.warning(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _obeyed(state: PyTree, order: Order, rollbacks: Rollbacks | None) -> PyTree:
    match order.order:
        case "hold":
            return audit.override(state, scale=order.scale or _least_scale(state))
        case "release":
            return audit.override(state, scale="auto")
        case "reset":
            return audit.reset(state)
        case "rollback":
            if rollbacks is not None:
                rollbacks.request(f"ordered by {order.who}")
            return state
        case mode:
            return audit.override(state, mode=mode)


def _least_scale(state: PyTree) -> float:
    scales = [x for name, x in audit.metrics(state).items() if name.rpartition("/")[2] == "scale"]
    return float(np.clip(min(np.min(x) for x in scales), LEAST, 1))


def _order(line: bytes) -> Order | None:
    """What a line asks for; None if it asks for nothing that is known."""
    try:
        read: Any = json.loads(line)
        order, scale, who, time = (read[name] for name in Order._fields)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if order not in ORDERS or not (scale is None or _is_scale(scale)):
        return None
    return Order(order, scale if scale is None else float(scale), str(who), str(time))


def _is_scale(x: Any) -> bool:
    """Whether it is a number in (0, 1] that float32 can hold."""
    if isinstance(x, jax.Array):
        x = np.asarray(x)[()]
    is_real = isinstance(x, float | int | np.floating | np.integer) and not isinstance(x, bool)
    return is_real and bool(LEAST <= x <= 1)


def _packed(orders: list[Order]) -> np.ndarray:
    return np.frombuffer(json.dumps(orders).encode(), np.uint8)


def _unpacked(packed: np.ndarray) -> list[Order]:
    return [Order(*fields) for fields in json.loads(packed.tobytes())]


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user here, as in some containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"

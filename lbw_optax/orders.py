"""What a person asks of a run that is under way, through a file in its directory.

`lbw-watch` writes the file; the run reads it between two steps. Nothing else is needed between the
two: no port, no signal, and it works over any file system that both can see.
"""

import getpass
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lbw_optax import audit
from lbw_optax.types import PyTree

FILE = "orders.jsonl"
ORDERS = ("hold", "release", "observe", "govern", "reset", "rollback")
# Steps between two looks at the file where several processes must look together.
EVERY = 10


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
    if scale is not None and not (order == "hold" and 0 < scale <= 1):
        raise ValueError(f'scale must be in (0, 1], and is for "hold" only; got {scale!r}.')
    given = Order(order, scale, _who(), datetime.now(UTC).isoformat(timespec="seconds"))
    # One write of a short line to a file that is only appended to: orders of two people stay whole.
    file = os.open(Path(directory) / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, (json.dumps(given._asdict()) + "\n").encode())
    finally:
        os.close(file)
    return given


class Orders:
    """Obeys what is asked in this directory from now on.

    What was asked before it was made is of an earlier process, and passed over.

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
        self._path = Path(directory) / FILE
        self._read = _size(self._path)

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
        """The whole lines since the last look; what is no order is passed over."""
        if _size(self._path) <= self._read:
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        return [order for line in whole.splitlines() if (order := _order(line)) is not None]


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
    return float(min(np.min(x) for x in scales))


def _order(line: bytes) -> Order | None:
    """What a line asks for; None if it asks for nothing that is known."""
    try:
        read: Any = json.loads(line)
        order = Order(*(read[name] for name in Order._fields))
    except (ValueError, KeyError, TypeError):
        return None
    scale = 1 if order.scale is None else order.scale
    sound = order.order in ORDERS and isinstance(scale, float | int) and 0 < scale <= 1
    return order if sound else None


def _packed(orders: list[Order]) -> np.ndarray:
    return np.frombuffer(json.dumps(orders).encode(), np.uint8)


def _unpacked(packed: np.ndarray) -> list[Order]:
    return [Order(*fields) for fields in json.loads(packed.tobytes())]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user here, as in some containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"

"""``lbw-watch``: one screen of a run that is kept up to date, and keys that order something."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lbw_optax import orders
from lbw_optax.watch import keyboard
from lbw_optax.watch.following import Following, finished

# Lines of the screen that are not interventions.
OTHER_LINES = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lbw-watch",
        description="A run in the terminal while it goes on: loss, scale, regime, interventions. "
        "Keys give orders, which the run obeys within ten steps and writes to its audit log.",
    )
    parser.add_argument(
        "run", metavar="RUN_DIR", type=Path, help="a directory with the logs of a run"
    )
    parser.add_argument("--once", action="store_true", help="print the screen once, and end")
    parser.add_argument(
        "--order",
        choices=orders.ORDERS,
        help="give this order instead of showing anything; reset lets an exhausted guard go on",
    )
    parser.add_argument("--scale", type=float, help="with --order hold: where to, in (0, 1]")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.run.is_dir():
            raise ValueError(f"{chosen.run} is not a run directory.")
        if chosen.scale is not None and chosen.order is None:
            raise ValueError("--scale is for --order hold: it says where to pin the scale.")
        if chosen.order is not None:
            return _give(chosen.run, chosen.order, chosen.scale)
        return _show(chosen.run, chosen.once)
    except OSError as error:
        print(f"lbw-watch: {error.filename}: {error.strerror}.", file=sys.stderr)
    except (ValueError, ImportError) as error:
        print(f"lbw-watch: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 0
    return 2


def _give(run: Path, order: str, scale: float | None) -> int:
    if finished(run):
        raise ValueError(f"{run} has finished: no process is left to obey an order.")
    given = orders.give(run, order, scale)
    print(f"{given.order}: ordered by {given.who} at {given.time}")
    return 0


def _show(run: Path, once: bool) -> int:
    try:
        from rich.console import Console, Group
        from rich.live import Live

        from lbw_optax.watch import screen
    except ImportError as error:
        raise ImportError("It needs the package rich: pip install 'lbw_optax[watch]'.") from error
    console, following = Console(), Following(run)

    def drawn(said: str) -> Group:
        size, name = console.size, run.resolve().name
        room = max(size.height - OTHER_LINES, 3)
        return screen.screen(name, following.look(), said, time.time(), size.width, room)

    if once or not (console.is_terminal and sys.stdin.isatty()):
        console.print(drawn(""))
        return 0
    said, asked = screen.HELP, ""
    with (
        keyboard.unbuffered(),  # before anything is shown: what is pressed then counts
        Live(drawn(said), console=console, screen=True, auto_refresh=False) as live,
    ):
        while (key := keyboard.pressed(0.5)) != screen.QUIT:
            if key == "b" and asked != "b":
                said, asked = "Go back to the last proven state? b again to order it.", "b"
            elif key in screen.KEYS and finished(run):
                said, asked = "The run has finished: no process is left to obey.", ""
            elif key in screen.KEYS:
                given = orders.give(run, screen.KEYS[key][0])
                said, asked = f"Ordered: {given.order}. The run obeys within ten steps.", ""
            elif key:
                said, asked = screen.HELP, ""
            live.update(drawn(said), refresh=True)
    return 0

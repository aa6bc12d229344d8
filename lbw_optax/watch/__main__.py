"""``python -m lbw_optax.watch``: the same as ``lbw-watch``."""

import sys

from lbw_optax.watch.command import main

if __name__ == "__main__":
    sys.exit(main())

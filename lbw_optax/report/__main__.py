"""``python -m lbw_optax.report``: the same as ``lbw-report``."""

import sys

from lbw_optax.report.command import main

if __name__ == "__main__":
    sys.exit(main())

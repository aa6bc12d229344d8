"""The control law: from the signals of a step to what is done about it, as pure functions.

`telemetry` measures, `statistics` remembers, `control` decides, `divergence` asks for a rollback,
`events` keeps what was done. `law.step` is all of it, in order.
"""

from lbw_optax.law.step import Law, init, step

__all__ = ["Law", "init", "step"]

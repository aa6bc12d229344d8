"""What a manager keeps where, and what it costs: for people and for logs."""

import math
from typing import NamedTuple


class Tiers(NamedTuple):
    """What was chosen and measured.

    Attributes:
      place: of the copies in memory: "device", "pinned_host", "host" or "off".
      snapshot_every: steps between them now; None where there are none.
      step_seconds: of a step, the median of the last 64; NaN before there is one.
      copy_seconds: of a copy, with nothing beside it, before the first step; NaN where the cadence
        was given.
      overhead: copy_seconds / (snapshot_every step_seconds), the most that copies cost.
      save_every: the cadence of checkpoints, in words.
      write_seconds: that the last checkpoint took, beside the steps; NaN before there is one.
      left_out: checkpoints that were due while the last was being written.
      device_bytes: of the copies on devices, on this process.
      host_bytes: of those in host memory.
      disk_bytes: of this process's part of the checkpoints, each counted as large as the state.
    """

    place: str
    snapshot_every: int | None
    step_seconds: float
    copy_seconds: float
    overhead: float
    save_every: str
    write_seconds: float
    left_out: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        """One line.

        >>> tiers = Tiers("host", 7, 0.5, 0.02, 0.0057, "25 steps", 1.0, 0, 0, 3 * 10**6, 10**6)
        >>> print(str(tiers).replace("), ", "),\\n"))
        copies in host memory every 7 steps (0.02 s each, 0.57 % of the time; 3 MB),
        checkpoints after 25 steps (1 MB)
        """
        disk = f"checkpoints after {self.save_every} ({_size(self.disk_bytes)})"
        if self.snapshot_every is None:
            return f"no copies in memory, {disk}"
        where = {"device": "on the device", "host": "in host memory"}
        cost = f"{self.copy_seconds:.2g} s each, {self.overhead:.2%} of the time; "
        cost = cost.replace("%", " %") if math.isfinite(self.overhead) else ""
        return (
            f"copies {where.get(self.place, 'in pinned host memory')} every {self.snapshot_every} "
            f"steps ({cost}{_size(self.device_bytes + self.host_bytes)}), {disk}"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"

"""On a CPU, the memory of a training step, kept by the process for the next one."""

import ctypes
import sys

# Names and numbers of <malloc.h>; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER, NONE, ONE = -1, 0, 1


def keep_freed() -> bool:
    """Tell glibc to give nothing back to the kernel; to be called before JAX makes its threads.

    XLA frees the buffers of a step and asks for as many in the next one. By default glibc maps
    large ones anew each time, and the kernel zeroes every page of them: up to a quarter of a step's
    time. With this the process keeps what it has once had, so it is for a script, which owns its
    process. What lies on a GPU is not concerned.

    Returns:
      Whether it was done: False where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    settings = {M_MMAP_MAX: NONE, M_TRIM_THRESHOLD: NEVER, M_ARENA_MAX: ONE}
    return mallopt is not None and all(mallopt(what, value) for what, value in settings.items())

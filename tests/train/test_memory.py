"""What the process keeps: page faults of a real one."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from train import memory

print(memory.keep_freed() if {keep} else None)

def step():
    return [np.full(2**22, float(i)) for i in range(3)]  # 32 MiB each, all touched, then freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def _run(keep: bool) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_memory_that_is_kept_is_not_mapped_again():
    said, faults = _run(keep=True)
    if said == "False":
        pytest.skip("this C library has no mallopt")
    assert faults < 0.1 * _run(keep=False)[1]

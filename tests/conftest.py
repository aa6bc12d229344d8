"""Strict switches for every test: rank promotion raises, eight simulated devices.

And what keeps the suite short: a program that one test has compiled, another one reads.
"""

import os
import shutil
import sys
import tempfile

# XLA's older code generator without LLVM's optimizations compiles the guard's many small loops in a
# third of the usual time: 2 s of a processor for 6 at 30 leaves (with the optimizations, 55 s). On
# newer Pythons, with the newest jax, tests are compiled as a user's program is.
if "LBW_TEST_XLA_FLAGS" not in os.environ:
    quick = ["--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0"]
    quick = quick if sys.version_info < (3, 12) else []
    os.environ["LBW_TEST_XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick])
os.environ["XLA_FLAGS"] = (
    os.environ["LBW_TEST_XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# One directory for all processes of a run, made and removed by the one that started them: nothing
# that an earlier run has compiled can pass.
IS_FIRST = "LBW_TEST_PROGRAMS" not in os.environ
if IS_FIRST:
    os.environ["LBW_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="lbw_optax-programs-")
PROGRAMS = os.environ["LBW_TEST_PROGRAMS"]

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", PROGRAMS)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_sessionfinish() -> None:
    if IS_FIRST:
        shutil.rmtree(PROGRAMS, ignore_errors=True)

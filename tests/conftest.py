"""Strict switches for every test: rank promotion raises, eight simulated devices.

And what keeps the suite short: a program that one test has compiled, another one reads.
"""

import os
import shutil
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# All workers of one run share it; the next run begins without, so that nothing old can pass.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
PROGRAMS = Path(tempfile.gettempdir()) / f"lbw_optax-programs-{RUN}"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The process that started the others removes it, as the last one to end."""
    if not hasattr(session.config, "workerinput"):
        uid = getattr(session.config.option, "testrunuid", None) or RUN
        shutil.rmtree(PROGRAMS.with_name(f"lbw_optax-programs-{uid}"), ignore_errors=True)

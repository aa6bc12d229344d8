"""The facts every result file needs: which code, libraries and machine made a number."""

import functools
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("jax", "jaxlib", "optax", "flax")


def provenance() -> dict[str, Any]:
    """Commit, versions and machine as plain JSON values, read once per process.

    A private host name is no fact about a number, so none is recorded.

    >>> sorted(provenance())
    ['commit', 'device', 'devices', 'dirty', 'machine', 'versions']
    """
    return dict(_provenance())


@functools.cache
def _provenance() -> dict[str, Any]:
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "versions": _versions(),
        "machine": machine(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def commits(records: Iterable[dict[str, Any]]) -> str:
    """Which ones the records were made at.

    >>> commits([{"commit": "a0" * 20, "dirty": False}])
    'a0a0a0a0a0'
    >>> commits([{"commit": "a0" * 20, "dirty": False}, {"commit": "10" * 20, "dirty": True}])
    '1010101010*, a0a0a0a0a0 (* with local changes)'
    """
    named = sorted({f"{r['commit']}"[:10] + "*" * bool(r["dirty"]) for r in records})
    changed = any(name.endswith("*") for name in named)
    return ", ".join(named) + " (* with local changes)" * changed


def machines(records: Iterable[dict[str, Any]]) -> str:
    """Which ones the records were made on.

    >>> machines([{"machine": "Xeon, 2 cores"}, {"machine": "EPYC, 2 cores"}])
    'EPYC, 2 cores; Xeon, 2 cores'
    """
    return "; ".join(sorted({r["machine"] for r in records}))


def made_at(records: Sequence[dict[str, Any]]) -> str:
    """Of which commits, on which machines, and with which jax the newest."""
    return f"commit {commits(records)}, {machines(records)}, jax {records[-1]['versions']['jax']}"


def machine() -> str:
    """Processor, usable cores and system, e.g. ``Intel(R) Xeon(R) Processor, 2 cores, Linux``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counted = "1 core" if cores == 1 else f"{cores} cores"
    return f"{_processor()}, {counted}, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _dirty() -> bool | None:
    """True when a file of the program differs from the commit or is new; results do not count."""
    status = _git("status", "--porcelain", "--", "*.py", "pyproject.toml")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """The output of git in this checkout; None without git or outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

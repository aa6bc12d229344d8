"""Where copies in memory lie: on the device, where they are small beside what is free there."""

import os
from collections.abc import Collection
from typing import NamedTuple

import jax

PINNED = "pinned_host"
# Copies are small that take together no more than this share of the memory that is free.
SMALL = 0.05


class Place(NamedTuple):
    """Where copies are kept.

    Attributes:
      name: "device", "pinned_host", or "host", which on a CPU is the device itself.
      is_small: whether all copies, one of each step on probation, are small there.
    """

    name: str
    is_small: bool


def choose(platform: str, kinds: Collection[str], nbytes: int, free: int | None) -> Place:
    """The place for copies of so many bytes a device, beside so many free ones, None if unknown.

    >>> choose("gpu", {"device", "pinned_host"}, nbytes=2 * 10**9, free=60 * 10**9)
    Place(name='device', is_small=True)
    >>> choose("gpu", {"device", "pinned_host"}, nbytes=30 * 10**9, free=60 * 10**9)
    Place(name='pinned_host', is_small=False)
    """
    is_small = free is not None and nbytes <= SMALL * free
    if platform == "cpu":
        return Place("host", is_small)
    return Place("device" if is_small or PINNED not in kinds else PINNED, is_small)


def free_bytes(device: jax.Device) -> int | None:
    """Of the device's memory, on a CPU of the machine's; None where nobody says."""
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def kinds(device: jax.Device) -> set[str]:
    """Kinds of memory that an array of this device may lie in."""
    return {memory.kind for memory in device.addressable_memories()}

"""Memory: how much may be taken, how much a device says was taken, and what the compiler leaves behind."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax

SLOW = 0.5
"""Seconds of compilation from which on freeing (some hundredths of a second) does not matter."""


def default_memory() -> int:
    """Choose the memory that a chunk of jobs may take: at most half of what the device has left, and 1 GiB on a CPU.

    (A CPU's matrix products are at full speed well below that, and smaller chunks show progress.)

    Returns:
        The size in bytes, a power of two.
    """
    stats = _device_memory()
    if "bytes_limit" in stats:
        return _rounded((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        free = 2**31
    return min(2**30, _rounded(free // 2))


def _rounded(size: int) -> int:
    """Down to a power of two: what depends on it must not change with every byte in use."""
    return 1 << max(0, size.bit_length() - 1)


class PeakMemory:
    """The bytes that a block of code took at its peak, beyond those in use before: `taken`.

    `None` where the device keeps no count (a CPU does not), and where the count, which only ever grows, was higher before.
    """

    def __init__(self) -> None:
        self.taken: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._before = _device_memory()
        return self

    def __exit__(self, *_: Any) -> None:
        peak = _device_memory().get("peak_bytes_in_use", 0)
        if {"bytes_in_use", "peak_bytes_in_use"} <= set(self._before) and peak > self._before["peak_bytes_in_use"]:
            self.taken = peak - self._before["bytes_in_use"]


def _device_memory() -> dict[str, int]:
    """What the first device counts of its memory; nothing on a CPU."""
    return jax.local_devices()[0].memory_stats() or {}


@contextlib.contextmanager
def compiler_memory_freed() -> Iterator[None]:
    """Return to the system, after each compilation in the context, the memory that the compiler is done with.

    glibc would keep it (about 100 MB, in the heaps of the compiler's threads), beside which the program then takes its
    own at its first run. Compilations of up to `SLOW` seconds are left out; where the C library cannot, nothing is
    done.

    Yields:
        Nothing.
    """
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > SLOW:
            trim(0)

    if trim is None:
        yield
        return
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)

"""What a reading costs: its time, its memory, and an end to both."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS, MEGABYTES = 2.0, 200.0
"""What reading one tiny file may take: CPU seconds of this process and those that it started, MB above what it had."""
_LONGEST = 10.0  # wall seconds after which a reading is interrupted, also where it waits for nothing
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class TooLong(BaseException):
    """A reading did not end by itself."""


class Cost:
    """Of one reading: CPU seconds, and megabytes (0 where the system does not tell)."""

    seconds = megabytes = 0.0

    @property
    def excess(self) -> str:
        """What is beyond the limits; empty where nothing is."""
        return (f"{self.seconds:.1f} s " if self.seconds > SECONDS else "") + (
            f"{self.megabytes:.0f} MB" if self.megabytes > MEGABYTES else ""
        )


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Measure the block, and raise `TooLong` in it where it does not end.

    The address space is bounded meanwhile, so that an allocation of terabytes is a `MemoryError` and does not end the tests.
    """
    import resource

    cost, before, start = Cost(), _peak(reset=True), _cpu_seconds()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = _field("VmSize")
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (int((size + 2048) * 2**20), hard))
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, _LONGEST, 0.5)
    try:
        yield cost
    finally:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        cost.seconds, cost.megabytes = _cpu_seconds() - start, _peak() - before


def _interrupt(*_):
    raise TooLong(f"it did not end in {_LONGEST} s")


def _cpu_seconds() -> float:
    return time.process_time()


def _field(name: str) -> float:
    """A field of this process' status, in MB."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0.0)


def _peak(reset: bool = False) -> float:
    """The most memory that this process has had, since the last reset."""
    with contextlib.suppress(OSError):
        if reset:
            _RESET.write_text("5")
    return _field("VmHWM")

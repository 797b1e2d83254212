"""What a program under judgement may use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STACK_MB = 128
"""Stack of a program's main thread at most: contest programs recurse deeply. What it uses counts as memory too."""


@dataclass(frozen=True, slots=True)
class CodeLimits:
    """Limits of one solution; a test that breaks one fails.

    Attributes:
        timeout_s: wall time for one test (a HumanEval check, a call, a run with one input), loading included.
        memory_mb: memory of each process (address space) and of all together (resident, sampled every 25 ms).
        total_timeout_s: wall time for all tests of one solution together.
        disk_mb: its private temporary folder; a file in it can be no larger.
        processes: processes and threads at once.
        output_mb: what it may print for one test, or return from one call.
        open_files: file descriptors of each process.
    """

    timeout_s: float = 10.0
    memory_mb: int = 1024
    total_timeout_s: float = 120.0
    disk_mb: int = 64
    processes: int = 16
    output_mb: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} = {value!r}; expected a number > 0")

    def rlimits(self, *, processes: int | None) -> dict[str, Any]:
        """Names and values of the kernel's limits; ``processes`` None leaves their number unbounded."""
        megabyte = 1 << 20
        limits = {
            "AS": self.memory_mb * megabyte,
            "STACK": STACK_MB * megabyte,
            "CPU": math.ceil(max(self.timeout_s, self.total_timeout_s)) + 1,  # the wall limit comes first
            "FSIZE": self.disk_mb * megabyte,
            "NOFILE": self.open_files,
            "CORE": 0,
            "MSGQUEUE": 0,
            "MEMLOCK": 0,
        }
        return limits | ({"NPROC": processes} if processes is not None else {})

"""What a training run costs: time without compiling, and the peak of memory; and the machine it ran on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class StepClock:
    """Times training steps. The first `compiling_steps` of them compile, and count as typical steps plus compiling."""

    def __init__(self, compiling_steps: int) -> None:
        self._compiling_steps = compiling_steps
        self._seconds: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block as one step; it must end in something that waits for the device, such as `loss.item()`."""
        start = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - start)

    def train_seconds(self, steps: int | None = None) -> float:
        """Seconds of the first `steps` steps (None: of all), without compiling."""
        seconds = self._seconds[:steps]
        first = [min(second, self._typical()) for second in seconds[: self._compiling_steps]]
        return sum(first) + sum(seconds[self._compiling_steps :])

    def compile_seconds(self) -> float:
        return sum(self._seconds) - self.train_seconds()

    def mean_step_seconds(self) -> float:
        return self.train_seconds() / len(self._seconds)

    def _typical(self) -> float:
        return statistics.median(self._seconds[self._compiling_steps :] or [min(self._seconds)])


class PeakMemory:
    """Peak memory of training steps: resident memory on a CPU, allocated memory on a GPU.

    The kernel's high-water mark (`VmHWM`) is reset after whatever is not to be counted. Where it can't be reset, on
    anything but Linux, the peak is the whole process's, compiling and validation included.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._peak = 0

    def restart(self) -> None:
        """Forget every peak so far, and hand back to the system what compiling has freed."""
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        self._peak = 0
        self._reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's memory out."""
        self._peak = self.peak()
        yield
        self._reset()

    def peak(self) -> int:
        """Bytes."""
        return max(self._peak, self._high_water_mark())

    def _high_water_mark(self) -> int:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists():
            return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _reset(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the resident set of now


def environment() -> dict[str, str]:
    """The machine, versions and commit that a measurement was made with."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "CPU": models[0] if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    return found | ({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def commit() -> str:
    """The checkout's short commit, with `-dirty` where files differ from it; `unknown` outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"

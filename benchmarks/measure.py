"""What this process can say about itself: resident memory and its peak, the bytes a training setup holds."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def wait_for(device: str) -> None:
    """Return when the device has done what it was given; on a CPU it has."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}; the benchmarks need Linux")


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The highest resident memory since the process began, or since `reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Set the high-water mark back to what is resident now (Linux: "5" to clear_refs)."""
    _CLEAR_REFS.write_text("5")


def release_freed() -> None:
    """Hand freed memory back to the system, so that what is resident is what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def map_large_buffers(threshold: int = 64 * 1024) -> None:
    """Have malloc map each buffer of `threshold` bytes or more by itself and unmap it when freed.

    Left alone, glibc raises its threshold to the size of what was freed (up to 32 MiB) and keeps such buffers in a
    heap that fragments, so that the resident peak tells the heap's history rather than the live tensors. Mapping costs
    page faults: call it after everything that is timed.
    """
    if not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold):
        raise RuntimeError("mallopt(M_MMAP_THRESHOLD) failed")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested containers and plain objects (galore-torch keeps its projection in one)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of these tensors, each tensor object once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that these tensors keep alive, each storage once: a view keeps all of what it is a view of."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Every tensor in the optimizer's state, projection matrices and quantisation maps included."""
    return list(_tensors(dict(optimizer.state)))


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, trained or not."""
    return storage_bytes([*model.parameters(), *model.buffers()])


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once for what ``run`` made, inside of library kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler
    total = peak = 0
    for event in events.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def keep_freed_memory() -> None:
    """Have glibc hand no freed memory back to the system, so that no step pays for getting it again.

    As it comes, malloc gives large blocks back and faults them in anew, page by page, thousands of times a step: how often
    depends on the sizes of blocks more than on how many bytes a method needs. The allocators that torch's tuning guide
    recommends for training on a CPU (jemalloc, tcmalloc) keep them as well.
    """
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)):
        raise RuntimeError("mallopt refused; the benchmarks need glibc")

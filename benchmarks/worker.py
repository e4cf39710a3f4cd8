"""The measured process: `python -m benchmarks.worker SETTINGS_JSON OUTPUT_PATH`, started afresh for every measurement.

The environment (threads, cache directory, malloc arenas) is the parent's to set: see `benchmarks.record.launch`.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import measure
from benchmarks.methods import METHODS, Fingerprint, Method, import_all, participation, refreshed
from benchmarks.model import DTYPES, Settings, Stack, build


@dataclass(frozen=True)
class StepSample:
    """Seconds of one training step, the compiled part (forward and backward) apart from the optimizer's call."""

    index: int
    refresh: bool
    forward_backward: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.forward_backward + self.optimizer


class Trainer:
    """A prepared model, what is called in its place, and the number of the step it is at."""

    def __init__(self, settings: Settings, method: Method) -> None:
        self.settings, self.method = settings, method
        self.model, self.input = build(settings)
        self.optimizer: Optimizer = method.prepare(self.model, settings)
        self.called: Any = self.model
        self.index = 0
        self.losses: list[float] = []
        if settings.blockwise:
            for block in self.model.blocks:
                block.compile(backend=method.backend)
        else:
            self.model.compile(backend=method.backend)

    def next_is_refresh(self) -> bool:
        """Whether the coming step is one that does more than a regular one."""
        return self.method.refreshes and self.index % self.settings.update_proj_gap == 0

    def step(self) -> StepSample:
        """Forward, backward, update, gradients dropped."""
        refresh, index, device = self.next_is_refresh(), self.index, self.settings.device
        measure.wait_for(device)
        start = time.perf_counter()
        loss = self._forward_backward()
        measure.wait_for(device)
        computed = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        measure.wait_for(device)
        end = time.perf_counter()
        self.index += 1
        self.losses.append(loss.item())
        if refreshed(self.method, self.optimizer, self.model) not in (None, refresh):
            raise RuntimeError(f"step {index} was to be a {'refresh' if refresh else 'regular step'} and was not")
        return StepSample(index, refresh, computed - start, end - computed)

    def run(self, steps: int) -> tuple[float, float]:
        """Take regular steps as a script does that looks at nothing; returns the seconds of one, until the device was done and
        until the host was."""
        device = self.settings.device
        measure.wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            self._forward_backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        host = time.perf_counter()
        measure.wait_for(device)
        self.index += steps
        return (time.perf_counter() - start) / steps, (host - start) / steps

    def _forward_backward(self) -> Tensor:
        for waiting in range(self.settings.micro_batches - 1, -1, -1):
            with self.method.accumulate(self.optimizer) if waiting else contextlib.nullcontext():
                loss: Tensor = self.called(self.input) / self.settings.micro_batches
                loss.backward()
        return loss


def warm_toolchain(dtype: torch.dtype) -> float:
    """Compile something trivial, so that what every first compile pays (imports, the C++ compiler's probing of the
    processor, precompiled headers) is in no method's compile time. Returns its seconds."""
    start = time.perf_counter()
    x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
    torch.compile(lambda t: (t.sin() @ t).float().sum())(x).backward()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return time.perf_counter() - start


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def compile_seconds(warmup: list[StepSample], regular: list[StepSample], refresh: list[StepSample]) -> float:
    """Seconds by which the first steps outlast later ones of their kind; the optimizer's call too, which may compile steps.

    Without a later refresh to compare with, the first step counts whole but for a regular step's time.
    """
    later_regular = statistics.median(s.seconds for s in regular)
    later_refresh = _median([s.seconds for s in refresh]) or later_regular
    return sum(s.seconds - (later_refresh if s.refresh else later_regular) for s in warmup)


def timed_steps(trainer: Trainer) -> list[StepSample]:
    """The measured regular steps and, with the automatic gap, the refresh that follows them."""
    return [trainer.step() for _ in range(trainer.settings.steps + trainer.method.refreshes)]


def memory_of_steps(trainer: Trainer) -> dict[str, int | None]:
    """Resident peaks of regular steps and of the next refresh (if it is near), every large buffer mapped by itself.

    Each peak comes with what was resident right before, so that `peak - before` is what a step needs beyond what
    stays: weights, optimizer state, and the interpreter with all that compiling left behind.
    """
    measure.map_large_buffers()
    trainer.step()  # buffers kept between steps move out of the heap
    measure.release_freed()
    before = measure.resident_bytes()
    measure.reset_peak()
    for _ in range(trainer.settings.warmup + trainer.settings.steps if trainer.method.refreshes else 3):
        if trainer.next_is_refresh():
            break
        trainer.step()
    sizes: dict[str, int | None] = {"before_regular": before, "peak_regular": measure.peak_resident_bytes()}
    sizes |= {"before_refresh": None, "peak_refresh": None}
    if trainer.next_is_refresh():
        measure.release_freed()
        sizes["before_refresh"] = measure.resident_bytes()
        measure.reset_peak()
        trainer.step()
        sizes["peak_refresh"] = measure.peak_resident_bytes()
    return sizes


def _kept_bytes(model: Stack, optimizer: Optimizer) -> dict[str, int]:
    state = measure.state_tensors(optimizer)
    return {
        "weights": measure.model_bytes(model),
        "state": measure.tensor_bytes(state),
        "state_kept_alive": measure.storage_bytes(state),
    }


def _compiler_counters() -> dict[str, int]:
    """Graphs that Dynamo captured and hits and misses of the compile caches."""
    counters = torch._dynamo.utils.counters
    return {
        "dynamo_graphs": counters["stats"]["unique_graphs"],
        "fx_cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "fx_cache_misses": counters["inductor"]["fxgraph_cache_miss"],
        "fx_cache_bypasses": counters["inductor"]["fxgraph_cache_bypass"],
        "autograd_cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "autograd_cache_misses": counters["aot_autograd"]["autograd_cache_miss"],
    }


def run(settings: Settings) -> dict[str, Any]:
    """Measure one method in this process."""
    method = METHODS[settings.method]
    torch.set_num_threads(settings.threads)
    import_all()
    toolchain = warm_toolchain(DTYPES[settings.dtype])
    trainer = Trainer(settings, method)
    fingerprint = Fingerprint(trainer.model)
    measure.release_freed()
    resident_before = measure.resident_bytes()

    warmup = [trainer.step() for _ in range(settings.warmup)]
    peak_compile = measure.peak_resident_bytes()
    measure.reset_peak()
    steps = timed_steps(trainer)
    peak_timed = measure.peak_resident_bytes()
    regular = [s for s in steps if not s.refresh]
    refresh = [s for s in steps if s.refresh]
    memory = memory_of_steps(trainer) if settings.memory else {}
    kept = _kept_bytes(trainer.model, trainer.optimizer)
    if not all(math.isfinite(loss) for loss in trainer.losses):
        raise RuntimeError(f"the loss is not finite: {trainer.losses}; times of such steps mean nothing")
    return {
        "step_seconds": _median([s.seconds for s in regular]),
        "optimizer_seconds": _median([s.optimizer for s in regular]),
        "refresh_seconds": _median([s.seconds for s in refresh]),
        "compile_seconds": compile_seconds(warmup, regular, refresh),
        "first_steps_seconds": sum(s.seconds for s in warmup),
        "toolchain_seconds": toolchain,
        "bytes": {
            **kept,
            **memory,
            "before_first_step": resident_before,
            "peak_compile": peak_compile,
            "peak_timed": peak_timed,
            "peak_overall": max(peak_compile, peak_timed, measure.peak_resident_bytes()),
        },
        "counters": _compiler_counters(),
        "participation": participation(method, trainer.model, trainer.optimizer, settings, fingerprint),
        "losses": [trainer.losses[0], trainer.losses[-1]],
        "steps": [vars(s) | {"seconds": s.seconds} for s in (*warmup, *steps)],
    }


def main() -> None:
    """Read the settings, measure, write the result as JSON."""
    settings = Settings(**json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(run(settings)))


if __name__ == "__main__":
    main()

"""How much of the time for which compact gradients travel is hidden behind the backward, taken from a trace.

    python -m benchmarks.overlap

Two ranks under DistributedDataParallel as in `benchmarks.throttled`, on a loopback that is held to `--mbit`. Steps are traced
by `torch.profiler`. A collective travels from the moment at which it is started until it is done, as Gloo's own record has it; a
rank waits while it stands in ``wait_tensor``. *Hidden* is one minus waiting over travelling. A model that is compiled whole has
its collectives in one backward graph; blocks that are compiled one by one have them in a graph each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import record
from benchmarks.methods import METHODS
from benchmarks.throttled import Together, join, start, throttle

COLLECTIVE, WAIT = "gloo:all_reduce", "_c10d_functional::wait_tensor"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["grass-blind"], metavar="METHOD")
    parser.add_argument("--mbit", type=float, default=400.0, help="millions of bits a second of the loopback (default 400)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    record.add_settings(parser, threads=1, batch=2, layers=4, steps=3)
    return parser.parse_args(arguments)


def union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def traced(trainer: Together) -> dict[str, Any]:
    """One step: milliseconds from its start of each collective and each wait, and what follows from them."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        seconds = trainer.step().seconds
    events = [event for event in profiler.events() or [] if event.name in (COLLECTIVE, WAIT)]
    times = {
        name: [(event.time_range.start / 1e3, event.time_range.end / 1e3) for event in events if event.name == name]
        for name in (COLLECTIVE, WAIT)
    }
    travelling, waiting = union(times[COLLECTIVE]), union(times[WAIT])
    return {
        "seconds": seconds,
        "collectives": times[COLLECTIVE],
        "waits": times[WAIT],
        "travelling_ms": travelling,
        "waiting_ms": waiting,
        "hidden": 1 - waiting / travelling,
    }


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """Trace, as one of the ranks; the first writes what it found."""
    join(rank, arguments, folder)
    arguments.gap = arguments.warmup + 2 * arguments.steps + 1  # one refresh, the first step
    found: dict[str, Any] = {}
    for name in arguments.methods:
        for blockwise in (False, True):
            trainer = Together(record.settings_of(arguments, name, blockwise=blockwise), METHODS[name])
            for _ in range(arguments.warmup):
                trainer.step()
            dist.barrier()
            if rank == 0:
                throttle(arguments.mbit * 1e6 / 8)
            steps = [traced(trainer) for _ in range(arguments.steps)]
            dist.barrier()
            if rank == 0:
                throttle(None)
            steps.sort(key=lambda step: step["hidden"])
            found[f"{name}, {'blocks' if blockwise else 'whole'}"] = steps[len(steps) // 2]
    if rank == 0:
        rows = [
            (name, *(f"{step[key]:.0f}" for key in ("travelling_ms", "waiting_ms")), f"{100 * step['hidden']:.0f} %")
            for name, step in found.items()
        ]
        print(record.table(("compiled", "ms travelling", "ms waiting", "hidden"), rows))
        arguments.inside = None
        path = arguments.out or record.default_output("overlap", record.settings_of(arguments, arguments.methods[0]))
        record.write(path, "overlap", arguments, {"results": found})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    start("benchmarks.overlap", parse(), work)

"""Time of one regular step, methods side by side in one process: they take turns, step by step.

`python -m benchmarks.side_by_side` forms every ratio between steps that ran within seconds of each other, and reports the
median and the quartiles of these. So a machine that others use as well, whose speed changes from minute to minute, hardly
disturbs it. One method at a time takes turns with dense training and with frozen weights: every further model would push the
others' weights out of the processor's caches, where those of a model that trains alone stay. Freed memory stays with the
process, as with the allocators that are recommended for training on a CPU; with `--allocator default` it is as glibc has it,
which costs methods that keep more alive thousands of page faults a step.
What it cannot tell is memory and compile time: for those each method needs a process of its own, see `benchmarks.step`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure, record
from benchmarks.methods import METHODS
from benchmarks.record import number
from benchmarks.worker import Trainer

DEFAULT = (
    "grass-rows", "grass-columns", "grass-auto", "grass-blind", "grass-muon",
    "grass-rows-deferred", "grass-columns-deferred",
)  # fmt: skip
BASES = ("dense", "frozen")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__)
    parser.add_argument(
        "--methods", nargs="+", choices=[name for name in METHODS if name not in BASES], default=list(DEFAULT), metavar="METHOD"
    )
    parser.add_argument("--turns", type=int, default=30, help="measured steps of every method (default 30)")
    parser.add_argument("--allocator", choices=("keeping", "default"), default="keeping", help="what becomes of freed memory")
    record.add_settings(parser)
    return parser.parse_args(arguments)


Seconds = dict[str, list[float]]
"""Seconds of every measured step, by method."""


def collect(arguments: argparse.Namespace) -> dict[str, Seconds]:
    """For each method its own steps and those of the bases that took turns with it."""
    torch.set_num_threads(arguments.threads)
    if arguments.allocator == "keeping":
        measure.keep_freed_memory()
    arguments.gap = arguments.warmup + arguments.turns + 1  # one refresh, the first step
    return {name: take_turns(arguments, [*BASES, name]) for name in arguments.methods}


def take_turns(arguments: argparse.Namespace, names: list[str]) -> Seconds:
    """Train several models in turn; the order within a turn is drawn anew, so that none always follows the same other."""
    torch._dynamo.reset()
    trainers = {name: Trainer(record.settings_of(arguments, name), METHODS[name]) for name in names}
    for trainer in trainers.values():
        for _ in range(arguments.warmup):
            trainer.step()
    seconds: Seconds = {name: [] for name in names}
    for turn in tqdm(range(arguments.turns), desc=names[-1], file=sys.stderr):
        for name in random.Random(turn).sample(names, len(names)):
            seconds[name].append(trainers[name].step().seconds)
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    """The median between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"low": low, "median": middle, "high": high}


def summarise(found: dict[str, Seconds]) -> dict[str, dict[str, Any]]:
    """Seconds of each method, and its ratios to each base, formed within a turn; first those of the bases themselves, in all
    turns."""
    together: Seconds = {base: [time for seconds in found.values() for time in seconds[base]] for base in BASES}
    summary = {base: _summary(base, together) for base in BASES}
    return summary | {name: _summary(name, seconds) for name, seconds in found.items()}


def _summary(name: str, seconds: Seconds) -> dict[str, Any]:
    own = seconds[name]
    ratios = {f"to_{base}": quartiles([a / b for a, b in zip(own, seconds[base], strict=True)]) for base in BASES}
    return {"seconds": quartiles(own), "fastest": min(own), **ratios}


def cell(found: dict[str, float], form: str) -> str:
    """The median, and the quartiles in brackets."""
    return f"{found['median']:{form}} ({found['low']:{form}}-{found['high']:{form}})"


def report(summary: dict[str, dict[str, Any]]) -> str:
    """One row per method."""

    rows = [
        [
            name,
            cell(s["seconds"], ".3f"),
            number({"median": s["fastest"]}, ".3f"),
            *(cell(s[f"to_{base}"], ".3f") for base in BASES),
        ]
        for name, s in summary.items()
    ]
    return record.table(["time", "s/step (quartiles)", "fastest", "/ dense", "/ frozen"], rows)


def main() -> int:
    """Measure, print, write."""
    arguments = parse()
    seconds = collect(arguments)
    summary = summarise(seconds)
    print(report(summary))
    content = {"summary": summary, "seconds": seconds}
    default = record.default_output("side_by_side", record.settings_of(arguments, arguments.methods[0]))
    record.write(arguments.out or default, "side_by_side", arguments, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

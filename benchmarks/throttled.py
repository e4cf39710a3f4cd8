"""Tokens per second under DistributedDataParallel where the link between the ranks is slow, and how slow it is is chosen.

    python -m benchmarks.throttled

Two ranks, one thread each, on one machine in a network namespace of their own, whose loopback a token bucket (`tc`) holds to some
bits a second; that needs Linux, `unshare`, `ip` and `tc`. Both ranks send through that one device, so a step whose gradients are
``B`` bytes takes ``2 B`` of it. The rates follow from dense training as it is found here: the gradients of a step take
``--share`` as long as a step does without a limit.

Methods take turns, step by step, at each rate; ratios are formed between steps of one turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import measure, record
from benchmarks.methods import METHODS, Method
from benchmarks.model import Settings
from benchmarks.worker import Trainer

RANKS = 2
DEFAULT = ("grass-blind", "grass-muon")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throttled", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT), metavar="METHOD")
    parser.add_argument("--share", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="default 0.5 1 2")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    record.add_settings(parser, threads=1, batch=1, layers=4, steps=10)
    return parser.parse_args(arguments)


class Together(Trainer):
    """Training by all ranks, each with a batch of its own."""

    def __init__(self, settings: Settings, method: Method) -> None:
        super().__init__(settings, method)
        self.called = DistributedDataParallel(self.model)
        torch.manual_seed(1 + dist.get_rank())
        self.input = torch.randn_like(self.input)

    @property
    def bytes(self) -> int:
        """Of all gradients."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


def throttle(bytes_per_second: float | None) -> None:
    """Limit what goes through the loopback of this namespace; None takes the limit away."""
    command = ["tc", "qdisc"]
    if bytes_per_second is None:
        subprocess.run([*command, "del", "dev", "lo", "root"], check=False, stderr=subprocess.DEVNULL)
        return
    limit = ["rate", f"{8 * bytes_per_second:.0f}bit", "burst", "256kb", "latency", "1s"]
    subprocess.run([*command, "replace", "dev", "lo", "root", "tbf", *limit], check=True)


def turns(trainers: dict[str, Together], number: int) -> dict[str, list[float]]:
    """Seconds of each step of each method."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(number):
        for name, trainer in trainers.items():
            dist.barrier()
            seconds[name].append(trainer.step().seconds)
    return seconds


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """Measure, as one of the ranks; the first writes what it found."""
    join(rank, arguments, folder)
    arguments.gap = arguments.warmup + (1 + len(arguments.share)) * arguments.steps + 1  # one refresh, the first step
    names = ["dense", *arguments.methods]
    trainers = {name: Together(record.settings_of(arguments, name, blockwise=True), METHODS[name]) for name in names}
    for trainer in trainers.values():
        for _ in range(arguments.warmup):
            trainer.step()
    free = turns(trainers, arguments.steps)
    sent = RANKS * trainers["dense"].bytes
    agreed = [statistics.median(free["dense"])]
    dist.broadcast_object_list(agreed)
    found: list[dict[str, Any]] = [{"bytes_per_second": None, "seconds": free}]
    for share in arguments.share:
        rate = sent / (share * agreed[0])
        dist.barrier()
        if rank == 0:
            throttle(rate)
        dist.barrier()
        found.append({"share": share, "bytes_per_second": rate, "seconds": turns(trainers, arguments.steps)})
    if rank == 0:
        throttle(None)
        report(arguments, found)
    dist.barrier()
    dist.destroy_process_group()


def report(arguments: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Print a table, write the results."""
    rows = []
    free = statistics.median(found[0]["seconds"]["dense"])
    for one in found:
        seconds, rate = one["seconds"], one["bytes_per_second"]
        dense = statistics.median(seconds["dense"])
        one["exchange"] = 1 - free / dense
        one["speedup"] = {
            name: statistics.median(d / s for d, s in zip(seconds["dense"], own, strict=True)) for name, own in seconds.items()
        }
        limit = "none" if rate is None else f"{8e-6 * rate:.0f} Mbit/s"
        ratios = [f"{one['speedup'][name]:.2f}" for name in arguments.methods]
        rows.append((limit, f"{dense:.2f}", f"{100 * one['exchange']:.0f} %", *ratios))
    names = [f"{name}, times faster" for name in arguments.methods]
    print(record.table(("limit", "dense s/step", "of it exchange", *names), rows))
    arguments.inside = None
    path = arguments.out or record.default_output("throttled", record.settings_of(arguments, "dense"))
    record.write(path, "throttled", arguments, {"results": found})


def start(module: str, arguments: argparse.Namespace, work: Callable[[int, argparse.Namespace, str], None]) -> None:
    """Begin the benchmark of a module again in a network namespace of its own, and there start the ranks.

    Args:
        module: its name.
        arguments: with ``inside``, the folder that the ranks share; None outside of the namespace.
        work: what each rank does, told its number and the folder.
    """
    if arguments.inside is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", module, *sys.argv[1:], "--inside", folder]
            inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
            raise SystemExit(subprocess.run(["unshare", "--map-root-user", "--net", *inside], check=False).returncode)
    torch.multiprocessing.spawn(work, (arguments, str(arguments.inside)), RANKS)  # type: ignore[no-untyped-call]


def join(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """Join the group of the ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.set_num_threads(arguments.threads)
    measure.keep_freed_memory()
    torch._dynamo.config.optimize_ddp = False  # a graph for each region, whatever DDP's buckets


if __name__ == "__main__":
    start("benchmarks.throttled", parse(), work)

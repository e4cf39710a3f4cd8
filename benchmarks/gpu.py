"""Steps on one GPU: `python -m benchmarks.gpu`, tokens a second, time by phase and peak memory of every method, at the widths of
real models.

The stack of `benchmarks.model` is compiled block by block; a few blocks of a width tell what all of them cost. Methods follow
each other in one process, each from an emptied allocator, and each takes `--steps` rounds of steps between a first and a last
refresh. A step's time is that of `ROUND` steps that nobody waits for, divided, the median of several such rounds; the time of a
phase is that of a step with the device waited for after each phase. `--fill-caches` takes two steps of everything and writes
nothing: run it for several methods at once, and what is measured afterwards in one process finds the code compiled.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks import measure, record
from benchmarks.methods import METHODS, Fingerprint, participation
from benchmarks.model import Settings
from benchmarks.record import number
from benchmarks.worker import Trainer

SIZES: dict[str, dict[str, int]] = {
    "350M": dict(d=1024, ffn=2736, layers=8, batch=16, seq=1024),
    "1B": dict(d=2048, ffn=5504, layers=6, batch=8, seq=1024),
    "3B": dict(d=3072, ffn=8192, layers=4, batch=4, seq=2048),
    "8B": dict(d=4096, ffn=14336, layers=3, batch=2, seq=2048),
    "tiny": dict(d=64, ffn=160, layers=2, batch=2, seq=32),
}
"""Widths of LLaMA models, a few blocks of each; ``tiny`` is for a look on a CPU."""

DEFAULT = (
    "dense", "frozen", "muon", "adamw8bit", "galore", "apollo", "lora",
    "grass-blind", "grass-blind-watched", "grass-columns", "grass-rows", "grass-muon", "grass-adamw8bit",
)  # fmt: skip
GIB = 2**30
ROUND, PHASES = 5, 5
"""Steps taken without waiting, and steps whose phases are timed."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1B", "8B"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT), metavar="METHOD")
    parser.add_argument("--ranks", type=int, default=8, help="the width is divided by this (default 8)")
    parser.add_argument("--fill-caches", action="store_true", help="compile, and measure nothing")
    record.add_settings(parser, dtype="bf16", warmup=4, device="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def settings_for(arguments: argparse.Namespace, size: str, method: str) -> Settings:
    """One measurement."""
    own = {**SIZES[size], "rank": SIZES[size]["d"] // arguments.ranks}
    gap = arguments.warmup + ROUND * arguments.steps + PHASES
    return replace(record.settings_of(arguments, method), blockwise=True, gap=gap, **own)


def peak(device: str) -> int:
    """The most bytes that tensors took since the last call; on a CPU, resident memory."""
    if device == "cpu":
        return measure.peak_resident_bytes()
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most


def measured(settings: Settings) -> dict[str, Any]:
    """Train one method and say what it took."""
    torch._dynamo.reset()
    start = time.perf_counter()
    trainer = Trainer(settings, METHODS[settings.method])
    before = Fingerprint(trainer.model)
    for _ in range(settings.warmup):
        trainer.step()
    warm = time.perf_counter() - start
    peak(settings.device)
    rounds = [trainer.run(ROUND) for _ in range(settings.steps)]
    regular = [trainer.step() for _ in range(PHASES)]
    peak_regular = peak(settings.device)
    refresh = trainer.step() if trainer.method.refreshes else None
    peak_refresh = peak(settings.device)
    tokens = settings.batch * settings.seq
    steps = [step for step, _ in rounds]
    step, quartiles = statistics.median(steps), statistics.quantiles(steps, n=4)
    facts = participation(trainer.method, trainer.model, trainer.optimizer, settings, before)
    return {
        "step_seconds": step,
        "quartiles": quartiles,
        "host_seconds": statistics.median(host for _, host in rounds),
        "forward_backward_seconds": statistics.median(sample.forward_backward for sample in regular),
        "optimizer_seconds": statistics.median(sample.optimizer for sample in regular),
        "refresh_seconds": refresh.seconds if refresh else None,
        "first_steps_seconds": warm,
        "tokens_per_second": tokens / step,
        "dense_flops_per_second": 6 * tokens * sum(w.numel() for w in trainer.model.linear_weights().values()) / step,
        "peak_regular": peak_regular,
        "peak_refresh": peak_refresh if refresh else None,
        "weights": measure.model_bytes(trainer.model),
        "state": measure.storage_bytes(measure.state_tensors(trainer.optimizer)),
        "participation": facts,
        "samples": steps,
    }


def attempt(settings: Settings, failures: list[str]) -> dict[str, Any] | None:
    """`measured`, or None with a line more in ``failures``."""
    try:
        return measured(settings)
    except Exception as error:
        failures.append(f"{settings.method}: {type(error).__name__}: {str(error)[:600]}")
        print(failures[-1], file=sys.stderr, flush=True)
        return None
    finally:
        gc.collect()
        if settings.device != "cpu":
            torch.cuda.empty_cache()


def ceilings(device: str) -> dict[str, float]:
    """What a large bf16 matrix product and a large copy reach here: operations and bytes (read and written) a second."""
    if device == "cpu":
        return {}
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    one, other = (torch.empty(2**31, dtype=torch.uint8, device=device) for _ in range(2))

    def seconds(run: Any) -> float:
        taken = []
        for _ in range(12):
            measure.wait_for(device)
            start = time.perf_counter()
            run()
            measure.wait_for(device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return {
        "flops_per_second": 2 * 8192**3 / seconds(lambda: a @ b),
        "bytes_per_second": 2**32 / seconds(lambda: one.copy_(other)),
    }


def report(results: dict[str, dict[str, Any]]) -> str:
    """One row a method; ratios to dense training and to frozen weights of the same size."""
    base = {name: results[name]["step_seconds"] for name in ("dense", "frozen") if name in results}
    rows = [
        [
            name,
            number(r["step_seconds"], ".2f", 1e-3),
            number(r["host_seconds"], ".2f", 1e-3),
            number(r["optimizer_seconds"], ".2f", 1e-3),
            number(r["refresh_seconds"], ".2f", 1e-3),
            *(number(r["step_seconds"] / base[b] if b in base else None, ".3f") for b in ("dense", "frozen")),
            number(r["tokens_per_second"], ",.0f"),
            number(r["peak_regular"], ".2f", GIB),
            number(r["peak_refresh"], ".2f", GIB),
            number(r["state"], ".3f", GIB),
        ]
        for name, r in results.items()
    ]
    header = ["method", "step ms", "host", "opt ms", "refresh", "/ dense", "/ frozen", "tokens/s", "peak GiB", "refresh", "state"]
    return record.table(header, rows)


def main() -> int:
    """Measure, print, write."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    failures: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for size in arguments.sizes:
        every = [settings_for(arguments, size, method) for method in arguments.methods]
        if arguments.fill_caches:
            every = [replace(settings, warmup=2, steps=2, gap=2 + 2 * ROUND + PHASES, layers=2) for settings in every]
        tried = {settings.method: attempt(settings, failures) for settings in every}
        found[size] = {name: result for name, result in tried.items() if result is not None}
    if arguments.fill_caches:
        return 0
    limits = ceilings(arguments.device)
    print({name: f"{value:.3g}" for name, value in limits.items()})
    for size, results in found.items():
        print(f"\n{size}: {SIZES[size]}")
        print(report(results))
    name = torch.cuda.get_device_name().replace(" ", "-") if arguments.device != "cpu" else "cpu"
    out = arguments.out or record.RESULTS / f"gpu-{name}-{'-'.join(arguments.sizes)}-{arguments.dtype}.json"
    content = {"device": name, "ceilings": limits, "sizes": SIZES, "results": found, "failures": failures}
    record.write(out, "gpu", arguments, content)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

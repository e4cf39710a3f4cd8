"""Inductor's estimate of the peak memory of each graph: frozen, dense, and grass in its regular and refresh variants.

Unlike a resident peak it has no interpreter, allocator or library in it, and it is the same on every run: the number to
watch while working on the graphs. `python -m benchmarks.memory` is one process, a compile per method.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure, record
from benchmarks.estimate import PeakEstimate, estimated_peaks
from benchmarks.methods import METHODS
from benchmarks.model import Settings, build
from benchmarks.record import MIB, number

DEFAULT_METHODS = ("frozen", "dense", "grass-rows", "grass-columns")
VARIANTS = ("refresh", "regular")
"""What the first step of a refreshing method is, and what the second."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT_METHODS), metavar="METHOD")
    parser.add_argument("--live", type=int, default=0, help="print this many of the buffers live at each peak")
    record.add_settings(parser)
    return parser.parse_args(arguments)


def estimates_of(settings: Settings) -> dict[str, Any]:
    """The estimates of one method's graphs by variant, and the bytes of its weights and optimizer state."""
    method = METHODS[settings.method]
    torch._dynamo.reset()
    model, x = build(settings)
    optimizer = method.prepare(model, settings)
    model.compile(backend=method.backend)
    graphs: dict[str, list[PeakEstimate]] = {}
    for variant in VARIANTS if method.refreshes and method.backend == "grass" else VARIANTS[1:]:
        with estimated_peaks() as graphs[variant]:
            model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = {
        "weights": measure.model_bytes(model),
        "state": measure.tensor_bytes(measure.state_tensors(optimizer)),
    }
    del model, optimizer
    gc.collect()
    return {"graphs": graphs, "bytes": sizes}


def _peak(graphs: list[PeakEstimate], kind: str) -> PeakEstimate | None:
    """The largest graph of a kind; a whole model gives one of each."""
    return max((g for g in graphs if g.kind == kind), key=lambda g: g.peak_bytes, default=None)


def report(results: dict[str, dict[str, Any]], live: int) -> str:
    """One row per method and variant."""
    rows, notes = [], []
    for method, result in results.items():
        for variant, graphs in result["graphs"].items():
            forward, backward = _peak(graphs, "forward"), _peak(graphs, "backward")
            cells = [
                number(forward.peak_bytes if forward else None, ".1f", MIB),
                number(backward.peak_bytes if backward else None, ".1f", MIB),
                number(backward.saved_bytes if backward else None, ".1f", MIB),
                number(result["bytes"]["state"], ".1f", MIB),
                str(sum(g.nodes for g in graphs)),
            ]
            rows.append([f"{method} {variant}", *cells])
            for graph in graphs if live else ():
                notes.append(f"\n{method} {variant} {graph.kind}, {graph.peak_bytes / MIB:.1f} MiB at the peak:")
                notes += [f"  {size / MIB:7.2f}  {name:10s} {what}" for name, size, what in graph.live[:live]]
    header = ["estimate, MiB", "forward", "backward", "saved", "state", "kernels"]
    return "\n".join([record.table(header, rows), *notes])


def _plain(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results as JSON takes them, without the buffers at the peak."""
    return {
        method: {
            "bytes": result["bytes"],
            "graphs": {
                variant: [{k: v for k, v in vars(graph).items() if k != "live"} for graph in graphs]
                for variant, graphs in result["graphs"].items()
            },
        }
        for method, result in results.items()
    }


def attempt(settings: Settings, failures: list[str]) -> dict[str, Any] | None:
    """`estimates_of`, or None with a line more in `failures`: one method's failure is not the end of the others."""
    try:
        return estimates_of(settings)
    except Exception as error:
        failures.append(f"{settings.method}: {type(error).__name__}: {error}")
        tqdm.write(failures[-1], file=sys.stderr)
        return None


def main() -> int:
    """Estimate, print, write. Returns 1 if any method failed."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    failures: list[str] = []
    every = [record.settings_of(arguments, method) for method in arguments.methods]
    tried = {s.method: attempt(s, failures) for s in tqdm(every, unit="method", file=sys.stderr)}
    results = {method: result for method, result in tried.items() if result is not None}
    print(report(results, arguments.live))
    content = {"estimates": _plain(results), "failures": failures}
    record.write(arguments.out or record.default_output("memory", every[0]), "memory", arguments, content)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

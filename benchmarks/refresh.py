"""What a refresh costs, by how the rows are scored: its time beside a regular step's and a dense step's, and the peaks of both.

`python -m benchmarks.refresh`. With a gap of two, every other step of a model is a refresh. So each refresh is compared with the
regular step before it, and with a dense step of the same turn: like `benchmarks.side_by_side`, this bears a machine whose speed
changes. The peaks are Inductor's estimates of the backward graphs.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

import grass_compile
from benchmarks import record
from benchmarks.estimate import estimated_peaks
from benchmarks.methods import METHODS
from benchmarks.model import Settings, build
from benchmarks.record import MIB
from benchmarks.side_by_side import cell, quartiles

SCORES = ("exact", "sampled", "estimate", "shared")
"""``shared``: estimated, and q, k, v as well as gate, up choose their columns together."""


class Trained:
    """A model and its optimizer, with a refresh on every other step."""

    def __init__(self, settings: Settings, axis: Any, scores: str | None) -> None:
        self.model, self.input = build(settings)
        named = self.model.named_parameters()
        if scores is None:
            self.optimizer: torch.optim.Optimizer = METHODS["dense"].prepare(self.model, settings)
        else:
            keywords: dict[str, Any] = dict(lr=settings.lr, weight_decay=0.0, rank=settings.rank, axis=axis, on_refresh="carry")
            keywords |= dict(selection="top", stagger=False, step_in_backward=True)
            keywords |= dict(scores="estimate", share_index=True) if scores == "shared" else dict(scores=scores)
            self.optimizer = grass_compile.AdamW(named, update_proj_gap=2, **keywords)
        self.model.compile(backend="inductor" if scores is None else "grass")

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.model(self.input).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def collect(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of dense, regular and refreshing steps, turn by turn, and the peaks of the backward."""
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 32
    settings = record.settings_of(arguments, "grass-rows")
    dense = Trained(settings, None, None)
    kinds = [(axis, scores) for axis in arguments.axes for scores in arguments.scores if (axis, scores) != ("rows", "shared")]
    trainers = {f"{axis} {scores}": Trained(settings, axis, scores) for axis, scores in kinds}
    peaks: dict[str, list[int]] = {}
    saved: dict[str, int] = {}
    dense.step()
    for name, trainer in tqdm(trainers.items(), desc="compiling", file=sys.stderr):
        with estimated_peaks() as refresh:
            trainer.step()
        if "exact" not in name:
            trainer.step()  # the second step proposes as well: a new interval is to begin with the third
        with estimated_peaks() as regular:
            trainer.step()
        first, then = ([graph for graph in graphs if graph.kind == "backward"] for graphs in (refresh, regular))
        then = then or first  # an estimate is part of every step's graph
        saved[name] = max(graph.saved_bytes for graph in then)
        peaks[name] = [max(graph.peak_bytes for graph in graphs) for graphs in (first, then)]
    seconds: dict[str, list[float]] = {f"{name} {kind}": [] for name in trainers for kind in ("regular", "refresh")}
    seconds["dense"] = []
    for _ in tqdm(range(arguments.turns), desc="turns", file=sys.stderr):
        seconds["dense"].append(dense.step())
        for name, trainer in trainers.items():
            for kind in ("refresh", "regular"):
                seconds[f"{name} {kind}"].append(trainer.step())
    return {
        name: {
            "refresh_to_regular": quartiles(_ratios(seconds[f"{name} refresh"], seconds[f"{name} regular"])),
            "refresh_to_dense": quartiles(_ratios(seconds[f"{name} refresh"], seconds["dense"])),
            "regular_to_dense": quartiles(_ratios(seconds[f"{name} regular"], seconds["dense"])),
            "saved_bytes": saved[name],
            "backward_peak_bytes": dict(zip(("refresh", "regular"), peaks[name], strict=True)),
        }
        for name in trainers
    }


def _ratios(own: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(own, other, strict=True)]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh", description=__doc__)
    parser.add_argument("--axes", nargs="+", choices=("rows", "columns"), default=["rows", "columns"])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--turns", type=int, default=15)
    record.add_settings(parser)
    arguments = parser.parse_args()
    summary = collect(arguments)
    header = ["scores", "refresh / regular", "refresh / dense", "regular / dense", "peak refresh", "peak regular", "saved, MiB"]
    rows = [
        [
            name,
            *(cell(found[key], ".2f") for key in ("refresh_to_regular", "refresh_to_dense", "regular_to_dense")),
            *(f"{found['backward_peak_bytes'][kind] / MIB:.0f}" for kind in ("refresh", "regular")),
            f"{found['saved_bytes'] / MIB:.0f}",
        ]
        for name, found in summary.items()
    ]
    print(record.table(header, rows))
    default = record.default_output("refresh", record.settings_of(arguments, "grass-rows"))
    record.write(arguments.out or default, "refresh", arguments, {"summary": summary})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile time: grass against plain Inductor, cold and on a second start, the whole model and block by block.

`python -m benchmarks.compile_time`. Every case gets a compile cache of its own and two fresh processes: the first finds
the cache empty (cold), the second finds what the first left (the second start). Cases of a round run in turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record
from benchmarks.methods import METHODS
from benchmarks.record import Sample, number, span, spread

STARTS = ("cold", "second")


@dataclass(frozen=True)
class Case:
    """A model compiled in one way: `layers` blocks, as a whole or each block by itself."""

    method: str
    layers: int
    blockwise: bool

    @property
    def name(self) -> str:
        """How the case is called in tables and results."""
        return f"{self.layers} blocks {'one by one' if self.blockwise else 'as a whole'}, {self.method}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    methods = ["dense", "grass-auto", "grass-blind"]
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=methods, metavar="METHOD")
    parser.add_argument("--blocks", nargs="*", type=int, default=[4, 32], help="depths compiled one by one (4 32)")
    parser.add_argument("--rounds", type=int, default=3, help="times every case is measured (default 3)")
    record.add_settings(parser, batch=1, steps=3)
    return parser.parse_args(arguments)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The whole model of `--layers` blocks, then each depth of `--blocks` block by block, for every method."""
    shapes = [(arguments.layers, False), *((depth, True) for depth in arguments.blocks)]
    return [Case(method, layers, blockwise) for layers, blockwise in shapes for method in arguments.methods]


def collect(arguments: argparse.Namespace, caches: Path) -> tuple[list[Sample], list[str]]:
    """Every measurement, and the messages of those that failed."""
    samples: list[Sample] = []
    failures: list[str] = []
    todo = [(turn, case) for turn in range(arguments.rounds) for case in cases(arguments)]
    with tqdm(total=len(todo) * len(STARTS), unit="run", file=sys.stderr) as bar:
        for turn, case in todo:
            settings = record.settings_of(arguments, case.method, layers=case.layers, blockwise=case.blockwise, memory=False)
            with tempfile.TemporaryDirectory(dir=caches) as cache:
                for start in STARTS:
                    bar.set_postfix_str(f"round {turn + 1}, {case.name}, {start}")
                    label = f"round {turn + 1}, {case.name}, {start}"
                    result = record.attempt(settings, Path(cache), arguments.timeout, label, failures)
                    if result is not None:
                        samples.append({"case": case.name, **vars(case), "round": turn, "start": start, **result})
                    bar.update()
    return samples, failures


def _ratio(samples: list[Sample], over: dict[str, Any], under: dict[str, Any]) -> dict[str, float] | None:
    """Compile time of the samples matching `over` relative to those matching `under`, round by round."""

    def matching(wanted: dict[str, Any]) -> dict[int, float]:
        hits = [s for s in samples if all(s[key] == value for key, value in wanted.items())]
        return {s["round"]: s["compile_seconds"] for s in hits}

    above, below = matching(over), matching(under)
    return spread(above[turn] / below[turn] for turn in above if turn in below)


def summarise(arguments: argparse.Namespace, samples: list[Sample]) -> dict[str, dict[str, Any]]:
    """Medians and extremes of every case; ratios are formed within a round."""
    depths = sorted(set(arguments.blocks))
    summary: dict[str, dict[str, Any]] = {}
    for case in cases(arguments):
        own = [s for s in samples if s["case"] == case.name]
        cold = {"case": case.name, "start": "cold"}
        dense = {**cold, "case": Case("dense", case.layers, case.blockwise).name}
        shallow = {**cold, "case": Case(case.method, depths[0], True).name} if depths else cold
        summary[case.name] = {start: spread(s["compile_seconds"] for s in own if s["start"] == start) for start in STARTS}
        summary[case.name] |= {
            "cold_to_dense": _ratio(samples, cold, dense),
            "second_to_cold": _ratio(samples, {**cold, "start": "second"}, cold),
            "cold_to_shallowest": _ratio(samples, cold, shallow) if case.blockwise else None,
            "dynamo_graphs": spread(s["counters"]["dynamo_graphs"] for s in own),
            "second_cache_hits": spread(_hits(s) for s in own if s["start"] == "second"),
            "second_cache_misses": spread(_misses(s) for s in own if s["start"] == "second"),
        }
    return summary


def _hits(sample: Sample) -> float:
    """Graphs served by Inductor's cache; a hit of AOTAutograd's cache loads its graphs through the same counter."""
    return float(sample["counters"]["fx_cache_hits"])


def _misses(sample: Sample) -> float:
    return float(sample["counters"]["fx_cache_misses"] + sample["counters"]["fx_cache_bypasses"])


def report(summary: dict[str, dict[str, Any]]) -> str:
    """One row per case."""
    rows = [
        [
            name,
            span(case["cold"]),
            number(case["cold_to_dense"]),
            number(case["cold_to_shallowest"]),
            span(case["second"]),
            number(case["second_to_cold"]),
            f"{number(case['second_cache_hits'], '.0f')}/{number(case['second_cache_misses'], '.0f')}",
            number(case["dynamo_graphs"], ".0f"),
        ]
        for name, case in summary.items()
    ]
    header = ["compile, s", "cold", "/ dense", "/ fewest blocks", "second start", "/ cold", "hits/misses", "graphs"]
    return record.table(header, rows)


def main() -> int:
    """Measure, print, write. Returns 1 if any measurement failed."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="grass-bench-") as caches:
        samples, failures = collect(arguments, Path(caches))
    summary = summarise(arguments, samples)
    print(report(summary))
    first = record.settings_of(arguments, arguments.methods[0])
    content = {"summary": summary, "failures": failures, "samples": samples}
    record.write(arguments.out or record.default_output("compile_time", first), "compile_time", arguments, content)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of one training step: grass against dense, frozen and its peers.

`python -m benchmarks.step` measures every method at the size of the README's table. Each measurement is a fresh
process; the rounds go over all methods in turn, so that a machine that drifts does so under all of them alike, and the
ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import record
from benchmarks.methods import METHODS
from benchmarks.record import MIB, Sample, number, span, spread

AMORTISED_OVER = 200
"""Steps between refreshes in the amortised column: the default of grass, GaLore and APOLLO alike."""


DEFAULT = [name for name in METHODS if not name.endswith(("-deferred", "-clipped"))]
"""The ways of grass's own that only its training loop tells apart are measured on request."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=3, help="times every method is measured (default 3)")
    parser.add_argument("--cold", action="store_true", help="a fresh compile cache for every process")
    record.add_settings(parser)
    return parser.parse_args(arguments)


def collect(arguments: argparse.Namespace, caches: Path) -> tuple[list[Sample], list[str]]:
    """Every measurement, and the messages of those that failed. The order rotates from round to round."""
    samples: list[Sample] = []
    failures: list[str] = []
    methods: list[str] = arguments.methods
    total = arguments.rounds * len(methods)
    with tqdm(total=total, unit="run", file=sys.stderr) as bar:
        for turn in range(arguments.rounds):
            shift = turn % len(methods)
            for method in methods[shift:] + methods[:shift]:
                bar.set_postfix_str(f"round {turn + 1}, {method}")
                cold = arguments.cold or turn == 0
                cache = caches / (f"{method}-{turn}" if arguments.cold else method)
                settings = record.settings_of(arguments, method)
                label = f"round {turn + 1}, {method}"
                result = record.attempt(settings, cache, arguments.timeout, label, failures)
                if result is not None:
                    samples.append({"method": method, "round": turn, "cold": cold, **result})
                bar.update()
    return samples, failures


def training_bytes(sample: Sample) -> float:
    """Weights, optimizer state, and what a regular step needs at its peak beyond what was resident before it.

    The part of a resident peak that is due to training, without the interpreter and what compiling left behind.
    """
    sizes = sample["bytes"]
    return float(sizes["weights"] + sizes["state_kept_alive"] + sizes["peak_regular"] - sizes["before_regular"])


def amortised_seconds(sample: Sample) -> float:
    """Seconds of a step when every `AMORTISED_OVER`-th is a refresh."""
    step = float(sample["step_seconds"])
    refresh = sample["refresh_seconds"]
    return step if refresh is None else step + (refresh - step) / AMORTISED_OVER


QUANTITIES = {
    "step_seconds": lambda s: s["step_seconds"],
    "amortised_seconds": amortised_seconds,
    "peak_bytes": lambda s: s["bytes"]["peak_regular"],
    "training_bytes": training_bytes,
}
"""What is set in relation to dense and frozen."""


def summarise(samples: list[Sample], method: str) -> dict[str, Any]:
    """Medians and extremes of one method over the rounds, and its ratios to dense and frozen in the same round."""
    own = [s for s in samples if s["method"] == method]
    summary: dict[str, Any] = {name: spread(of(s) for s in own) for name, of in QUANTITIES.items()}
    for base in ("dense", "frozen"):
        by_round = {s["round"]: s for s in samples if s["method"] == base}
        pairs = [(s, by_round[s["round"]]) for s in own if s["round"] in by_round]
        summary |= {f"{name}_to_{base}": spread(of(s) / of(b) for s, b in pairs) for name, of in QUANTITIES.items()}
    summary |= {
        "refresh_seconds": spread(s["refresh_seconds"] for s in own),
        "peak_refresh_bytes": spread(s["bytes"]["peak_refresh"] for s in own),
        "peak_overall_bytes": spread(s["bytes"]["peak_overall"] for s in own),
        "state_bytes": spread(s["bytes"]["state"] for s in own),
        "state_kept_alive_bytes": spread(s["bytes"]["state_kept_alive"] for s in own),
        "compile_cold_seconds": spread(s["compile_seconds"] for s in own if s["cold"]),
        "compile_warm_seconds": spread(s["compile_seconds"] for s in own if not s["cold"]),
    }
    return summary


def report(summaries: dict[str, dict[str, Any]]) -> str:
    """The tables that the parent prints: time, then memory, then compile time."""
    time_rows, memory_rows, compile_rows = [], [], []
    for method, s in summaries.items():
        cells = [number(s[f"step_seconds{suffix}"], ".3f") for suffix in ("", "_to_dense", "_to_frozen")]
        amortised = number(s["amortised_seconds_to_dense"], ".3f")
        time_rows.append([method, *cells, number(s["refresh_seconds"], ".3f"), amortised])
        memory_rows.append(
            [
                method,
                *(number(s[f"{n}_bytes"], ".0f", MIB) for n in ("peak_overall", "peak_refresh", "peak")),
                number(s["peak_bytes_to_dense"]),
                number(s["training_bytes"], ".0f", MIB),
                number(s["training_bytes_to_dense"]),
                number(s["training_bytes_to_frozen"]),
                number(s["state_bytes"], ".1f", MIB),
                number(s["state_kept_alive_bytes"], ".1f", MIB),
            ]
        )
        compile_rows.append([method, span(s["compile_cold_seconds"]), span(s["compile_warm_seconds"])])
    time_header = ["time", "s/step", "/ dense", "/ frozen", "refresh s", f"/ dense, refresh every {AMORTISED_OVER}"]
    memory_header = ["memory, MiB", "peak overall", "refresh", "regular", "/ dense", "training", "/ dense", "/ frozen"]
    tables = [
        record.table(time_header, time_rows),
        record.table([*memory_header, "state", "kept alive"], memory_rows),
        record.table(["compile, s", "cold (min-max)", "warm (min-max)"], compile_rows),
    ]
    return "\n\n".join(tables)


def main() -> int:
    """Measure, print, write. Returns 1 if any measurement failed."""
    arguments = parse()
    first = record.settings_of(arguments, arguments.methods[0])
    with tempfile.TemporaryDirectory(prefix="grass-bench-") as caches:
        samples, failures = collect(arguments, Path(caches))
    measured = [m for m in arguments.methods if any(s["method"] == m for s in samples)]
    summaries = {method: summarise(samples, method) for method in measured}
    print(report(summaries))
    content = {"summary": summaries, "failures": failures, "samples": samples}
    record.write(arguments.out or record.default_output("step", first), "step", arguments, content)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What it costs to watch the border: `python -m benchmarks.border`, the share of a training step that goes into deciding for each
weight where it moves, into the stand-ins, and into watching the loop (`step_in_backward="auto"`).

The functions that do this are timed inside of ordinary steps of a deep model that is compiled block by block, which is where
there are most of them; each is timed without what it calls into compiled code.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

import grass_compile
from benchmarks import measure, record
from benchmarks.model import Settings, build
from grass_compile import _autograd
from grass_compile.optim import base
from grass_compile.runtime import delivery
from grass_compile.runtime.call import Call
from grass_compile.runtime.manager import ProjectionManager
from grass_compile.runtime.parameter import ProjectedParameter

TIMED: tuple[tuple[Any, str], ...] = (
    (Call, "before_backward"),
    (Call, "after_backward"),
    (ProjectedParameter, "refusal"),
    (base, "check_step"),
    (ProjectionManager, "stand_ins"),
    (ProjectionManager, "leave_off"),
    (ProjectionManager, "warn_of_nothing"),
    (_autograd, "kept_in_place"),
    (delivery, "_deliver"),
)
"""What is there for the border alone, by the class or module that holds it."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.border", description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=("auto", "fused", "deferred"), default=["auto", "fused", "deferred"])
    record.add_settings(parser, layers=32, d=512, ffn=1376, steps=10)
    return parser.parse_args(arguments)


def timed(seconds: dict[str, float]) -> Callable[[], None]:
    """Have every function of `TIMED` add what it takes to ``seconds``; returns what undoes this."""
    originals = [(holder, name, getattr(holder, name)) for holder, name in TIMED]

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return wrapper

    for holder, name, function in originals:
        setattr(holder, name, wrap(name, function))
    return lambda: [setattr(holder, name, function) for holder, name, function in originals] and None


def measure_mode(mode: str, settings: Settings) -> dict[str, Any]:
    """Seconds of a step and of each function of `TIMED` in it, medians, for one ``step_in_backward``."""
    torch._dynamo.reset()
    model, x = build(settings)
    wanted: Any = {"auto": "auto", "fused": True, "deferred": False}[mode]
    optimizer = grass_compile.AdamW(model.named_parameters(), lr=settings.lr, rank=settings.rank, step_in_backward=wanted)
    for block in model.blocks:
        block.compile(backend="grass")
    steps: list[float] = []
    parts: dict[str, list[float]] = defaultdict(list)
    for number in range(settings.warmup + settings.steps):
        seconds: dict[str, float] = defaultdict(float)
        undo = timed(seconds)
        measure.wait_for(settings.device)
        start = time.perf_counter()
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        measure.wait_for(settings.device)
        total = time.perf_counter() - start
        undo()
        if number >= settings.warmup:
            steps.append(total)
            for _, name in TIMED:
                parts[name].append(seconds[name])
    median = {name: statistics.median(values) for name, values in parts.items()}
    step = statistics.median(steps)
    return {"mode": mode, "fused": bool(optimizer.fused), "step": step, "parts": median, "share": sum(median.values()) / step}


def main() -> None:
    """Measure, print a table, write the results."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    measure.keep_freed_memory()
    settings = record.settings_of(arguments, "grass-blind", blockwise=True)
    results = [measure_mode(mode, settings) for mode in arguments.modes]
    rows = [(r["mode"], "yes" if r["fused"] else "no", f"{1e3 * r['step']:.0f} ms", f"{100 * r['share']:.2f} %") for r in results]
    print(record.table(("step_in_backward", "fused in the end", "step", "share of the border"), rows))
    for result in results:
        print(result["mode"], {name: f"{1e3 * value:.2f} ms" for name, value in result["parts"].items()})
    record.write(arguments.out or record.default_output("border", settings), "border", arguments, {"results": results})


if __name__ == "__main__":
    main()

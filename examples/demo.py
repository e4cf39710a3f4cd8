"""Trains a small LLaMA on bytes four times, dense and with grass, each with AdamW and with Muon, on the same data and seed.

    python examples/demo.py                     # four runs of 220 steps
    DEMO_STEPS=20 python examples/demo.py       # a quick look
    python examples/demo.py --text ~/notes      # any folder of text instead of the Python standard library

Writes `report.md`, `metrics.json` and `loss.png` into `out/`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from corpus import load_corpus
from measure import environment
from rates import with_best_rates
from report import Run, table, write_report
from runner import run
from training import TrainConfig


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    print(load_corpus(options.text))  # first of all: a folder without text is to fail here
    runs = []
    for label, method in methods(options).items():
        config, tried = with_best_rates(method)
        log = options.out / "logs" / f"{re.sub('[^A-Za-z0-9]+', '-', label)}.log"
        runs.append(Run(label, config, tried, run(config, label, log)))

    write_report(runs, environment(), options.out)
    print("\n".join(["", *table(runs), "", f"bigram model: {runs[0].result['bigram_loss']:.4f}"]))
    print(f"report: {options.out / 'report.md'}   curves: {options.out / 'loss.png'}")


def methods(options: argparse.Namespace) -> dict[str, TrainConfig]:
    """The runs by their labels, in the order of the table; their learning rates are yet to be chosen."""
    dense = TrainConfig(lr=0.0, steps=options.steps, seed=options.seed, device=options.device, text=options.text)
    grass = replace(
        dense,
        axis=options.axis,
        update_proj_gap=options.update_proj_gap,
        on_refresh=options.on_refresh,
        selection=options.selection,
    )
    width = dense.hidden_size
    if options.rank is None and options.optimizer is None:
        return {
            "dense AdamW": dense,
            "grass Muon, r = d/2": replace(grass, optimizer="Muon", rank=width // 2),  # what is recommended: docs/choosing.md
            "dense Muon": replace(dense, optimizer="Muon"),
            "grass AdamW, r = d/8": replace(grass, optimizer="AdamW", rank=width // 8),  # the fastest
        }
    optimizer = options.optimizer or "Muon"
    ranks = options.rank or [width // 2 if optimizer == "Muon" else width // 8]
    asked = {f"grass {optimizer}, r = {rank}": replace(grass, optimizer=optimizer, rank=rank) for rank in ranks}
    return {"dense AdamW": dense, **asked, "dense Muon": replace(dense, optimizer="Muon")}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", metavar="DIR", help="a folder of text (default: the Python standard library)")
    parser.add_argument("--steps", type=int, default=int(os.environ.get("DEMO_STEPS", TrainConfig.steps)))
    parser.add_argument("--rank", type=int, nargs="+", help="ranks of the grass runs (default: d/2 with Muon, d/8 with AdamW)")
    parser.add_argument("--optimizer", choices=("AdamW", "Muon"), help="of the grass runs (default: Muon at --rank, else both)")
    parser.add_argument("--axis", choices=("auto", "rows", "columns"), default=TrainConfig.axis)
    parser.add_argument("--selection", choices=("top", "norm", "uniform"), default=TrainConfig.selection)
    parser.add_argument("--on-refresh", choices=("reset", "carry", "keep"), default=TrainConfig.on_refresh)
    parser.add_argument("--update-proj-gap", type=int, default=TrainConfig.update_proj_gap, metavar="K")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps (DEMO_STEPS) must be at least 1")
    return options


def run_program(arguments: list[str] | None = None) -> None:
    """`main`, with what the user can mend said in one line instead of a traceback."""
    try:
        main(arguments)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    run_program()

"""Finds the demo's learning rates: every method of the demo at every rate, recorded one JSON line a run.

    python -m benchmarks.sweep                                   # the demo's three methods (about an hour on two cores)
    python -m benchmarks.sweep --methods grass-32 --grass-lrs 3e-3 6e-3 --axis columns

A run that is recorded already is not run again, so a sweep that was stopped goes on where it was. The demo reads the
recorded file (`examples/rates.py`). What grass leaves dense is trained at the best rate found for dense training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.record import ROOT, circumstances

sys.path.insert(0, str(ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from rates import RECORDED_SWEEP, read_sweep, with_best_rates
from runner import run
from training import TrainConfig

DENSE_LRS = (5e-4, 1e-3, 2e-3)
GRASS_LRS = (1.5e-3, 3e-3, 6e-3)


def main() -> None:
    options = parse()
    base = TrainConfig(
        lr=0.0,
        steps=options.steps,
        optimizer=options.optimizer,
        axis=options.axis,
        on_refresh=options.on_refresh,
        selection=options.selection,
        stagger=options.stagger,
        update_proj_gap=options.update_proj_gap,
    )
    methods = {"dense": TrainConfig(lr=0.0, steps=options.steps)}
    for rank in (base.hidden_size // 8, base.hidden_size // 4, base.hidden_size // 2):
        methods[f"grass-{rank}"] = replace(base, rank=rank)
    unknown = set(options.methods or ()) - set(methods)
    if unknown:
        sys.exit(f"sweep: no method {', '.join(sorted(unknown))}; there are {', '.join(methods)}")

    for name in options.methods or ("dense", "grass-32", "grass-64"):
        rates = options.dense_lrs if name == "dense" else options.grass_lrs
        found = list(configurations(methods[name], rates, options.query_lr_factors, options.out))
        for config in tqdm(found, desc=name, unit="run"):
            record(config, name, options.out)


def configurations(method: TrainConfig, rates: list[float], factors: list[float], out: Path) -> Iterator[TrainConfig]:
    """`method` at each rate. Its dense rest takes the best dense rate in `out`, so the dense runs come first."""
    if method.rank is None:
        yield from (replace(method, lr=lr) for lr in rates)
        return
    dense, _ = with_best_rates(replace(method, rank=None), out)
    yield from (replace(method, lr=lr, dense_lr=dense.lr, query_lr_factor=factor) for factor in factors for lr in rates)


def record(config: TrainConfig, name: str, out: Path) -> None:
    """Run `config` and append its record to `out`, unless one is there."""
    if any(line["config"] == asdict(config) for line in read_sweep(out)):
        return
    label = f"{name} lr {config.lr:g}" + (f" queries {config.query_lr_factor:g}" if config.rank is not None else "")
    result = run(config, label, Path("out") / "logs" / f"sweep-{label.replace(' ', '-')}.log")
    kept = ("val_loss", "bigram_loss", "tokens_per_second", "train_seconds", "compile_seconds", "curve")
    line = {"method": name, "config": asdict(config), **{key: result[key] for key in kept}, **circumstances()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: dense, grass-32 and grass-64")
    parser.add_argument("--dense-lrs", nargs="+", type=float, default=list(DENSE_LRS), metavar="LR")
    parser.add_argument("--grass-lrs", nargs="+", type=float, default=list(GRASS_LRS), metavar="LR")
    parser.add_argument("--query-lr-factors", nargs="+", type=float, default=[TrainConfig.query_lr_factor], metavar="FACTOR")
    parser.add_argument("--optimizer", choices=("AdamW", "Muon"), default=TrainConfig.optimizer)
    parser.add_argument("--axis", choices=("auto", "rows", "columns"), default=TrainConfig.axis)
    parser.add_argument("--selection", choices=("top", "norm", "uniform"), default=TrainConfig.selection)
    parser.add_argument("--on-refresh", choices=("reset", "carry", "keep"), default=TrainConfig.on_refresh)
    parser.add_argument("--stagger", action=argparse.BooleanOptionalAction, default=TrainConfig.stagger)
    parser.add_argument("--update-proj-gap", type=int, default=TrainConfig.update_proj_gap, metavar="K")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--out", type=Path, default=RECORDED_SWEEP)
    return parser.parse_args()


if __name__ == "__main__":
    main()

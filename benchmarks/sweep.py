"""Finds the demo's learning rates: every method of the demo at every rate, recorded one JSON line a run.

    python -m benchmarks.sweep                                   # the demo's four methods
    python -m benchmarks.sweep --methods grass-AdamW-32 --lrs 3e-3 6e-3 --axis rows

A run that is recorded already is not run again, so a sweep that was stopped goes on where it was. The demo reads the
recorded file (`examples/rates.py`). What grass leaves dense, and dense Muon to AdamW, is trained at dense AdamW's best rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.record import ROOT, circumstances

sys.path.insert(0, str(ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from rates import RECORDED_SWEEP, read_sweep, with_best_rates
from runner import run
from training import TrainConfig

LRS = {
    "dense": (5e-4, 1e-3, 2e-3),
    "dense-Muon": (6e-3, 1.2e-2),
    "grass-AdamW": (1.5e-3, 3e-3, 6e-3),
    "grass-Muon": (3e-3, 6e-3, 1.2e-2),
}
"""The rates tried of each method, whatever its rank."""
STEPS = 300
VALIDATIONS = 20


def main() -> None:
    options = parse()
    grass = TrainConfig(
        validations=VALIDATIONS,
        lr=0.0,
        steps=options.steps,
        axis=options.axis,
        on_refresh=options.on_refresh,
        selection=options.selection,
        stagger=options.stagger,
        update_proj_gap=options.update_proj_gap,
        device=options.device,
    )
    dense = TrainConfig(lr=0.0, steps=options.steps, validations=VALIDATIONS, query_lr_factor=1.0, device=options.device)
    methods = {"dense": dense, "dense-Muon": replace(dense, optimizer="Muon")}
    for optimizer in ("AdamW", "Muon"):
        for rank in (dense.hidden_size // 8, dense.hidden_size // 4, dense.hidden_size // 2):
            methods[f"grass-{optimizer}-{rank}"] = replace(grass, optimizer=optimizer, rank=rank)
    unknown = set(options.methods) - set(methods)
    if unknown:
        sys.exit(f"sweep: no method {', '.join(sorted(unknown))}; there are {', '.join(methods)}")

    for name in options.methods:
        lrs = options.lrs or LRS[name.rstrip("-0123456789")]
        found = list(configurations(methods[name], lrs, options.query_lr_factors, options.out))
        for config in tqdm(found, desc=name, unit="run"):
            record(config, name, options.out)


def configurations(
    method: TrainConfig, lrs: Sequence[float], factors: Sequence[float] | None, out: Path
) -> Iterator[TrainConfig]:
    """`method` at each rate. What it leaves to AdamW takes the best dense rate in `out`, so the dense runs come first."""
    if method.rank is None and method.optimizer == "AdamW":
        yield from (replace(method, lr=lr) for lr in lrs)
        return
    dense, _ = with_best_rates(replace(method, rank=None, optimizer="AdamW"), out)
    factors = factors or [method.query_lr_factor]
    yield from (replace(method, lr=lr, dense_lr=dense.lr, query_lr_factor=factor) for factor in factors for lr in lrs)


def record(config: TrainConfig, name: str, out: Path) -> None:
    """Run `config` and append its record to `out`, unless one is there."""
    if any(line["config"] == asdict(config) for line in read_sweep(out)):
        return
    label = f"{name} lr {config.lr:g}" + (f" queries {config.query_lr_factor:g}" if config.dense_lr is not None else "")
    result = run(config, label, Path("out") / "logs" / f"sweep-{label.replace(' ', '-')}.log")
    kept = ("val_loss", "bigram_loss", "tokens_per_second", "train_seconds", "compile_seconds", "curve")
    line = {"method": name, "config": asdict(config), **{key: result[key] for key in kept}, **circumstances()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    demo = ("dense", "dense-Muon", "grass-Muon-128", "grass-AdamW-32")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=demo, help="default: the demo's, " + ", ".join(demo))
    parser.add_argument("--lrs", nargs="+", type=float, metavar="LR", help="default: some of each method's own")
    parser.add_argument("--query-lr-factors", nargs="+", type=float, metavar="FACTOR", help="default: 2 with grass, 1 without")
    parser.add_argument("--axis", choices=("auto", "rows", "columns"), default=TrainConfig.axis)
    parser.add_argument("--selection", choices=("top", "norm", "uniform"), default=TrainConfig.selection)
    parser.add_argument("--on-refresh", choices=("reset", "carry", "keep"), default=TrainConfig.on_refresh)
    parser.add_argument("--stagger", action=argparse.BooleanOptionalAction, default=TrainConfig.stagger)
    parser.add_argument("--update-proj-gap", type=int, default=TrainConfig.update_proj_gap, metavar="K")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default=TrainConfig.device)
    parser.add_argument("--out", type=Path, default=RECORDED_SWEEP)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Learning rates of the demo's runs: the best of a recorded sweep, or a fallback for a run that no sweep covers.

`benchmarks/sweep.py` records one JSON line a run, with its whole `TrainConfig` and the validation loss it ended at.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from training import Event, TrainConfig

RECORDED_SWEEP = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "demo_sweep.jsonl"

FALLBACK_DENSE_LR = 1e-3  # of what AdamW trains densely, all of a model or the rest of one
FALLBACK_LR = {"AdamW": 3e-3, "Muon": 6e-3}  # of everything else; docs/choosing.md
_RATES = ("lr", "dense_lr", "query_lr_factor")

# A run of another length, other text or another device keeps the learning rates found.
_NOT_COMPARED = {*_RATES, "steps", "validations", "validation_windows", "text", "device", "seed"}
_GRASS_ONLY = {"axis", "update_proj_gap", "on_refresh", "selection", "stagger"}
_BEFORE = {  # what runs did whose record does not say
    "selection": "top",
    "stagger": False,
    "query_lr_factor": 1.0,
    "optimizer": "AdamW",
}


def with_best_rates(config: TrainConfig, sweep: Path = RECORDED_SWEEP) -> tuple[TrainConfig, int]:
    """`config` with the learning rates of the run that ended lowest in `sweep`, and how many runs it was the lowest of.

    Runs of this model, batch and method are compared, the longest of them alone. Where there are none, the rates are fallback
    rates, and the number is 0.
    """
    alike = [record for record in read_sweep(sweep) if _compared(record["config"]) == _compared(asdict(config))]
    longest = max((record["config"]["steps"] for record in alike), default=0)
    alike = [record for record in alike if record["config"]["steps"] == longest]
    if alike:
        best = min(alike, key=lambda record: record["val_loss"])["config"]
        return replace(config, **{name: best[name] for name in _RATES}), len(alike)
    if config.rank is None and config.optimizer == "AdamW":
        return replace(config, lr=FALLBACK_DENSE_LR), 0
    factor = 1.0 if config.rank is None else 2.0
    return replace(config, lr=FALLBACK_LR[config.optimizer], dense_lr=FALLBACK_DENSE_LR, query_lr_factor=factor), 0


def read_sweep(sweep: Path) -> list[Event]:
    """The records of a sweep; none where the file isn't there."""
    records = [json.loads(line) for line in sweep.read_text().splitlines()] if sweep.exists() else []
    return [{**record, "config": {**_BEFORE, **record["config"]}} for record in records]


def _compared(config: Event) -> Event:
    ignored = _NOT_COMPARED | (_GRASS_ONLY if config["rank"] is None else set())
    return {name: value for name, value in config.items() if name not in ignored}

"""The study enumerates runs hours before it gets to them: each must at least make its optimizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")

from benchmarks import quality, quality_report
from benchmarks.quality_run import SIZES, Run, optimizer_of
from training import build_model


class Rehearsal(quality.Study):
    """Records a made-up loss for each run at once."""

    def run(self, run: Run) -> None:
        if self.find(run) is None:
            line = json.dumps(dataclasses.asdict(run))
            self.records.append({"run": json.loads(line), "val_loss": 2 + zlib.crc32(line.encode()) / 2**32})


def rehearsed(path: pathlib.Path) -> Iterator[Run]:
    study = Rehearsal(path / "none.jsonl")
    for stage in quality.STAGES.values():
        for run in stage(study):
            study.run(run)
    for record in study.records:
        yield Run(**record["run"])


def test_every_run_of_the_study_makes_its_optimizer(tmp_path: pathlib.Path) -> None:
    ours = [run for run in rehearsed(tmp_path) if run.method[0].isupper()]
    assert len(ours) > 60 and len({run.label for run in ours}) > 60
    models = {size: build_model(next(run for run in ours if run.size == size).training()) for size in SIZES}
    for run in ours:
        optimizer, backend = optimizer_of(run, models[run.size])
        assert backend == "grass" and optimizer.param_groups[0]["rank"] == round(
            models[run.size].config.hidden_size / run.rank_share
        )


def test_report_compares_like_with_like(tmp_path: pathlib.Path) -> None:
    """Seeds with dense training's same seeds; runs of another length, or with the rest at another rate, with their own kind."""

    def record(run: Run, loss: float) -> quality.Record:
        curve = [{"step": step, "seconds": step, "val_loss": loss} for step in range(4)]
        return {"run": dataclasses.asdict(run), "val_loss": loss, "optimizer_state_bytes": 1, "train_seconds": 1, "curve": curve}

    pytest.importorskip("matplotlib")
    dense = [record(Run("dense", "small", 2e-3, 2e-3, seed=seed), loss) for seed, loss in enumerate((2.0, 1.0))]
    others = [Run("dense", "small", 2e-3, 1e-3), Run("fira", "small", 8e-3, 2e-3, 4), Run("fira", "small", 8e-3, 1e-3, 4)]
    second = record(Run("lora", "small", 1e-3, 2e-3, 4, seed=1), 1.5)
    longer = record(Run("Muon", "small", 1e-2, 2e-3, 2, steps=900), 0.5)
    quality_report.write_report(
        [*dense, *(record(run, loss) for run, loss in zip(others, (3.0, 2.2, 2.4), strict=True)), second, longer], tmp_path
    )
    text = (tmp_path / "report.md").read_text()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[2:5] for line in text.splitlines() if line.startswith("| ")}
    assert cells["dense"] == ["1.5000 ± 0.707", "+0.0 %", "0 1"]
    assert cells["fira d/4"] == ["2.2000", "+10.0 %", "0"]
    assert cells["lora d/4"] == ["1.5000", "+50.0 %", "1"]  # compared with dense training's second seed
    assert cells["Muon d/2 900 steps"] == ["0.5000", "", "0"]

"""The study enumerates runs hours before it gets to them: each must at least make its optimizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")

from benchmarks import quality
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

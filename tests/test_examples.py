"""The demo: which runs it makes, at which rates, what its loop does to a fused step, and what it writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import grass_compile
from benchmarks import sweep  # first: it makes the demo's scripts importable
from demo import methods, parse
from grass_compile.backend import grass
from grass_compile.optim.rules.muon import iteration_dtype
from optimizers import DenseMuon, build_optimizer
from rates import RECORDED_SWEEP, with_best_rates
from report import Run, table, write_report
from training import COMPILING_STEPS, TrainConfig, build_model, prepare, train

TINY: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, layers=1, heads=2, batch_size=2, sequence_length=16, validation_windows=2, validations=2
)


def test_runs_of_the_demo() -> None:
    """Dense AdamW, what is recommended next to it, dense Muon, and the fastest of ours."""
    runs = methods(parse(["--steps", "7"]))
    made = [(label, config.optimizer, config.rank) for label, config in runs.items()]
    assert made == [
        ("dense AdamW", "AdamW", None),
        ("grass Muon, r = d/2", "Muon", 128),
        ("dense Muon", "Muon", None),
        ("grass AdamW, r = d/8", "AdamW", 32),
    ]
    assert all(config.steps == 7 for config in runs.values())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rank", "64", "16"], [("Muon", 64), ("Muon", 16)]),
        (["--optimizer", "AdamW"], [("AdamW", 32)]),
        (["--optimizer", "Muon"], [("Muon", 128)]),
        (["--rank", "64", "--optimizer", "AdamW"], [("AdamW", 64)]),
    ],
)
def test_ranks_and_optimizer_of_the_grass_runs(arguments: list[str], expected: list[tuple[str, int]]) -> None:
    runs = methods(parse(arguments)).values()
    assert [(run.optimizer, run.rank) for run in runs if run.rank is not None] == expected
    assert [run.optimizer for run in runs if run.rank is None] == ["AdamW", "Muon"]


def test_runs_of_the_demo_have_recorded_rates() -> None:
    """Several of each, so that none is compared at a rate that nobody looked for."""
    tried = {label: with_best_rates(method)[1] for label, method in methods(parse([])).items()}
    assert len(tried) == 4 and min(tried.values()) > 1


def test_recommended_run_has_the_documented_rates() -> None:
    config, _ = with_best_rates(methods(parse([]))["grass Muon, r = d/2"])
    assert (config.lr, config.dense_lr, config.query_lr_factor) == (6e-3, 1e-3, 2.0)


def test_rates_are_the_best_of_the_longest_runs_alike(tmp_path: pathlib.Path) -> None:
    wanted = TrainConfig(lr=0.0, rank=64, optimizer="Muon", steps=10)
    lines = [
        (dataclasses.replace(wanted, lr=1.0, steps=300), 2.0),
        (dataclasses.replace(wanted, lr=2.0, steps=300, dense_lr=0.5), 1.0),
        (dataclasses.replace(wanted, lr=3.0, steps=200), 0.5),  # shorter
        (dataclasses.replace(wanted, lr=4.0, steps=300, rank=None), 0.5),  # dense Muon
        (dataclasses.replace(wanted, lr=5.0, steps=300, optimizer="AdamW"), 0.5),
    ]
    path = tmp_path / "sweep.jsonl"
    path.write_text("\n".join(json.dumps({"config": dataclasses.asdict(config), "val_loss": loss}) for config, loss in lines))
    config, tried = with_best_rates(wanted, path)
    assert (config.lr, config.dense_lr, config.steps, tried) == (2.0, 0.5, 10, 2)
    dense, tried = with_best_rates(dataclasses.replace(wanted, rank=None), path)
    assert (dense.lr, tried) == (4.0, 1)
    adamw, tried = with_best_rates(dataclasses.replace(wanted, rank=None, optimizer="AdamW"), path)
    assert (adamw.lr, tried) == (1e-3, 0)


def test_sweep_knows_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense run of the recorded sweep is run again."""
    monkeypatch.setattr(sweep, "run", lambda *_: pytest.fail("a recorded run was run again"))
    dense = TrainConfig(lr=0.0, steps=sweep.STEPS, validations=sweep.VALIDATIONS, query_lr_factor=1.0)
    configs = list(sweep.configurations(dense, sweep.LRS["dense"], None, RECORDED_SWEEP))
    assert len(configs) == 3
    for config in configs:
        sweep.record(config, "dense", RECORDED_SWEEP)


def test_dense_muon_is_torchs_muon_and_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of the blocks move by Muon's rule, everything else by AdamW's; a schedule reaches both."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda matrix: matrix.to(iteration_dtype(matrix.device)))
    config = TrainConfig(lr=3e-2, dense_lr=1e-2, optimizer="Muon", query_lr_factor=1.0, **TINY)
    model, twin = build_model(config), build_model(config)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, DenseMuon)
    hidden = {name for name, p in twin.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
    assert len(hidden) == 7
    named = dict(twin.named_parameters())
    muon = torch.optim.Muon([named[n] for n in sorted(hidden)], lr=3e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for n, p in named.items() if n not in hidden], lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        scheduler.step()
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 3e-2 / (step + 1), 1e-2 / (step + 1)
        muon.step()
        adamw.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")
    assert len(optimizer.state) == len(named)  # what the demo's table counts


@pytest.fixture
def text(tmp_path: pathlib.Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    for file in RECORDED_SWEEP.parents[2].glob("examples/*.py"):
        (folder / file.name).write_text(file.read_text())
    return str(folder)


@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("Muon", marks=pytest.mark.exhaustive)])
def test_loop_steps_inside_the_backward(optimizer: str, text: str) -> None:
    """Nothing that the demo's loop does between backward and step keeps weights from moving in the backward."""
    config = TrainConfig(lr=1e-3, rank=16, optimizer=optimizer, steps=COMPILING_STEPS + 2, text=text, **TINY)
    made: list[grass_compile.Optimizer] = []
    moves: list[bool] = []

    def prepared(model: Any, config: TrainConfig) -> tuple[torch.optim.Optimizer, Any]:
        made.append(prepare(model, config)[0])  # type: ignore[arg-type]
        return made[0], functools.partial(grass, options={"compiler": "aot_eager"})

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            moves.append(bool(made[0].fused))

    result = train(config, report, prepared)
    assert not moves[0] and all(moves[COMPILING_STEPS - 1 :]) and len(moves) == config.steps
    assert result["weights_move"].startswith("inside the backward")


def run_of(label: str, config: TrainConfig, loss: float, tried: int) -> Run:
    curve = [{"step": 0, "seconds": 0, "val_loss": 5.0}, {"step": 9, "seconds": 9, "val_loss": loss}]
    costs = dict(
        tokens_per_second=1e3 * loss, train_seconds=3.0, compile_seconds=4.0, peak_memory_bytes=1, optimizer_state_bytes=2
    )
    setting = dict(parameters=3_000_000, corpus="some text", bigram_loss=2.5, weights_move="in opt.step()")
    projection = None if config.rank is None else "a table"
    return Run(label, config, tried, {"val_loss": loss, "curve": curve, **costs, **setting, "projection": projection})


def test_report_has_a_line_and_a_curve_for_each_run(tmp_path: pathlib.Path) -> None:
    runs = [run_of(f"run {i}", TrainConfig(lr=1e-3, rank=i or None), 2.0 - i / 8, tried=3 - i) for i in range(4)]
    lines = table(runs)
    assert len(lines) == 2 + 4 and "over run 0" in lines[0]
    assert "1.7500" in lines[4] and "-12.5 %" in lines[4] and "× 0.88" in lines[4]
    assert "0.001 *" in lines[5] and "*" not in lines[4]
    write_report(runs, {"CPU": "one"}, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "3 for run 0; 2 for run 1; 1 for run 2. Runs marked with *" in report and all(line in report for line in lines)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [run["rates_tried"] for run in metrics["runs"]] == [3, 2, 1, 0]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

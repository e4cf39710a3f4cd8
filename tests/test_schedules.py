"""Numbers that change between steps: right, and without compiling anything again."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from grass_compile.math.reference import ReferenceAdamW
from grass_compile.passes import pipeline

from . import forms, paper


class Compilations:
    """How often Dynamo captured a graph and a backward was finished."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backwards = 0
        original = pipeline.finish_backward

        def finish(*args: Any, **kwargs: Any) -> Any:
            self.backwards += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(pipeline, "finish_backward", finish)

    def now(self) -> tuple[int, int]:
        return self.backwards, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("deferred", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_thousand_steps_compile_nothing_again(deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cosine schedule, refreshes, accumulation every third step, betas and decay that change."""
    model = forms.LinearBias()
    optimizer = paper.AdamW(
        model.named_parameters(), lr=1e-2, rank=6, update_proj_gap=50, weight_decay=0.1, on_refresh="carry",
        step_in_backward=not deferred, axis="columns",
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    compilations, after = Compilations(monkeypatch), (0, 0)
    batches = [forms.batch(torch.float32, seed) for seed in range(7)]
    for step in range(1000):
        for last in (False, True) if step % 3 == 2 else (True,):
            with contextlib.nullcontext() if last or deferred else optimizer.accumulate():
                forms.loss_of(compiled(batches[step % 7])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.999 - 1e-5 * step)
        optimizer.param_groups[0]["weight_decay"] = 0.1 + 1e-4 * step
        if step == 60:  # a refresh, a regular step and an accumulated one of each have been seen
            after = compilations.now()
    assert compilations.now() == after
    assert optimizer.state[model.layer.weight]["updates"] == 1000


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 2e-2, total_steps=10),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt,
            [torch.optim.lr_scheduler.LinearLR(opt, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)],
            milestones=[3],
        ),
    ],
    ids=["cosine", "onecycle", "lambda", "sequential"],
)
def test_schedulers_equal_the_oracle(schedule: Any) -> None:
    """The scheduler drives ours; the oracle copies learning rate and first beta."""
    model = forms.LinearBias().double()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, eps=1e-3, rank=6, axis="rows", update_proj_gap=3)
    oracle = ReferenceAdamW(twin.named_parameters(), projected={"layer.weight": (0, 6)}, eps=1e-3, update_proj_gap=3)
    driver = schedule(optimizer)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(9):
        x = forms.batch(torch.float64, step)
        oracle.lr, oracle.betas = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
        forms.loss_of(compiled(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        driver.step()
        forms.loss_of(twin(x)).backward()
        oracle.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_weight_decay_switched_on_is_compiled_once() -> None:
    """From zero the graph must begin to touch the whole weight; the numbers are right before and after."""
    model = forms.LinearBias().double()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, eps=1e-3, rank=6, axis="rows", update_proj_gap=3)
    oracle = ReferenceAdamW(twin.named_parameters(), projected={"layer.weight": (0, 6)}, lr=1e-2, eps=1e-3, update_proj_gap=3)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(6):
        optimizer.param_groups[0]["weight_decay"] = oracle.weight_decay = 0.0 if step < 2 else 0.3
        x = forms.batch(torch.float64, step)
        forms.loss_of(compiled(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        forms.loss_of(twin(x)).backward()
        oracle.step()
    assert _distance(model, twin) < 1e-10


def _distance(model: nn.Module, twin: nn.Module) -> float:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(model.parameters(), twin.parameters(), strict=True))
    return max(float((p - q).detach().abs().max()) for p, q in pairs)

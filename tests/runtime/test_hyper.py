"""Hyper-parameters of compiled steps stay where they are, whatever becomes of their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile.runtime.hyper import HyperTensors

WIDTH = 12


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Every tensor that is handed out, with the weight that it is for."""
    found: list[tuple[str, Tensor]] = []
    original = HyperTensors.of

    def of(self: HyperTensors, record: Any, *rest: Any) -> Tensor:
        tensor = original(self, record, *rest)
        found.append((record.name, tensor))
        return tensor

    monkeypatch.setattr(HyperTensors, "of", of)
    return found


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"selection": "top"},
        {"selection": "top", "scores": "estimate"},
        {"nonfinite": "propagate", "on_refresh": "reset"},
        {"stochastic_rounding": True},
        {"step_in_backward": False},
        {"max_grad_norm": 1.0},
    ],
    ids=str,
)
def test_a_schedule_and_refreshes_leave_them_where_they_are(
    handed_out: list[tuple[str, Tensor]], keywords: dict[str, Any]
) -> None:
    """As a CUDA graph needs it: no new address, though the rate changes at each step and a refresh comes at every third."""
    model = net().bfloat16() if keywords.get("stochastic_rounding") else net()
    settings: dict[str, Any] = dict(lr=1e-2, rank=4, update_proj_gap=3, stagger=False, step_in_backward=True)
    optimizer = grass_compile.AdamW(model.named_parameters(), **{**settings, **keywords})
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    dtype = next(model.parameters()).dtype
    kept: list[Tensor] = []  # so that no address is given to another tensor
    early: set[int] = set()
    for step in range(14):
        handed_out.clear()
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        compiled(torch.randn(5, WIDTH, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept += [tensor for _, tensor in handed_out]
        seen = {tensor.data_ptr() for _, tensor in handed_out}
        assert seen and handed_out[-1][1][0] == torch.tensor(1e-2 / (1 + step), dtype=torch.float32)
        if step < 5:
            early |= seen
        else:
            assert seen <= early, step


def test_weights_that_are_not_at_one_step_do_not_share(handed_out: list[tuple[str, Tensor]]) -> None:
    """Each draws by its own seed from when one of them is frozen for a step."""
    model = net().bfloat16()
    optimizer = grass_compile.AdamW(
        model.named_parameters(), lr=1e-2, rank=4, stagger=False, stochastic_rounding=True, step_in_backward=True
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(6):
        model[0].weight.requires_grad_(step != 2)
        handed_out.clear()
        compiled(torch.randn(5, WIDTH).bfloat16()).float().square().mean().backward()
        numbers = {name: (tensor.data_ptr(), tensor.tolist()) for name, tensor in handed_out}
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            assert len(set(map(str, numbers.values()))) == 1
        elif step > 2:
            (one, first), (other, second) = numbers.values()
            assert one != other and first != second

"""Weight decay of bf16 weights: where it rounds away, the pass over the weight is left out, and no bit differs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile.math.rounding import ROUNDS_AWAY
from grass_compile.runtime import registry, rows

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
"""All numbers of bf16."""


@pytest.mark.parametrize("rate", [1e-8, 1e-5, 1e-4, 5e-4, ROUNDS_AWAY])
def test_it_rounds_away_for_every_number(rate: float) -> None:
    factor = torch.tensor(1.0 - rate)
    decayed = (EVERY.float() * factor).to(torch.bfloat16)
    assert torch.equal(decayed.view(torch.int16)[~EVERY.isnan()], EVERY.view(torch.int16)[~EVERY.isnan()])


def test_just_beyond_twice_that_it_shows() -> None:
    decayed = (EVERY.float() * torch.tensor(1.0 - 2.01 * ROUNDS_AWAY)).to(torch.bfloat16)
    assert (decayed != EVERY)[EVERY.isfinite()].any()


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 24, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).float().square().mean()


def trained(
    rates: list[float], dtype: torch.dtype = torch.bfloat16, decay: float = 0.1, **keywords: object
) -> tuple[Tensor, list[bool]]:
    """The weight, and at which steps the whole of it was decayed."""
    torch._dynamo.reset()
    model = Net(dtype)
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, seed=1, weight_decay=decay, update_proj_gap=100, **keywords)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    generator = torch.Generator().manual_seed(0)
    decays = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        compiled(torch.randn(8, 16, generator=generator).to(dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
        record = registry.lookup(model.linear.weight)
        assert record is not None
        decays.append(record.config().decays)
    return model.linear.weight.detach(), decays


@pytest.mark.parametrize("mode", [True, False])
def test_leaving_it_out_changes_no_bit(mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out, decays = trained([1e-3] * 5, step_in_backward=mode)
    assert decays == [False] * 5
    monkeypatch.setattr(rows, "ROUNDS_AWAY", -1.0)
    taken, decays = trained([1e-3] * 5, step_in_backward=mode)
    assert decays == [True] * 5 and torch.equal(left_out, taken)


def test_a_schedule_that_makes_it_show_compiles_once_more_and_stays() -> None:
    """As much as the selected columns hide: those that never move are what they were, times the decays that show."""
    rates = [1e-3, 0.5, 0.5, 1e-3]
    weight, decays = trained(rates, step_in_backward=True)
    assert decays == [False, True, True, True]
    before = Net(torch.bfloat16).linear.weight.detach()
    expected = before
    for rate in rates:
        expected = (expected.float() * torch.tensor(1.0 - rate * 0.1)).to(torch.bfloat16)
    still = (weight == expected).all(0)
    assert int(still.sum()) == 12 and not (weight == before).all(0).any()  # 4 of 16 columns are selected


@pytest.mark.parametrize("kind", ["warmup", "one cycle"])
def test_a_scheduler_says_beforehand_that_it_will_show(kind: str) -> None:
    model = Net(torch.bfloat16)
    optimizer = grass_compile.AdamW(model.named_parameters(), lr=0.1, rank=4, weight_decay=0.1)
    if kind == "warmup":
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1000)
    else:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100, div_factor=1e6)
    record = registry.lookup(model.linear.weight)
    assert record is not None and optimizer.param_groups[0]["lr"] < 1e-6 and record.config().decays


@pytest.mark.parametrize(
    ("dtype", "keywords"), [(torch.float32, {}), (torch.bfloat16, {"stochastic_rounding": True})], ids=["fp32", "stochastic"]
)
def test_elsewhere_every_decay_shows(dtype: torch.dtype, keywords: dict[str, bool]) -> None:
    _, decays = trained([1e-6], dtype, step_in_backward=True, **keywords)
    assert decays == [True]


def test_a_coupled_decay_is_part_of_the_gradient() -> None:
    model = Net(torch.bfloat16)
    optimizer = grass_compile.SGD(model.named_parameters(), lr=1e-3, rank=4, weight_decay=1e-3)
    record = registry.lookup(model.linear.weight)
    assert optimizer is not None and record is not None and record.config().decays

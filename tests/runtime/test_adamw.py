"""The optimizer against torch's own and against the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import grass_compile
from grass_compile.optim.rules import AdamWRule

from .. import forms, paper
from ..harness import pair
from ..pairs import every_pair


def mlp() -> nn.Module:
    """Two layers with biases and a norm, which stays dense."""
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 16))


def loss(output: torch.Tensor) -> torch.Tensor:
    return (output - 1).square().mean()


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Train on fixed batches, one for each step."""
    for step in range(first, first + count):
        x = torch.randn(7, 24, dtype=dtype, generator=torch.Generator().manual_seed(step))
        loss(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("axis", "compiler"),
    [
        ("rows", "aot_eager"),
        ("columns", "aot_eager"),
        pytest.param("rows", "inductor", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
        pytest.param("columns", "inductor", marks=pytest.mark.inductor),
    ],
)
def test_full_rank_equals_torch_adamw(axis: str, compiler: str) -> None:
    model = mlp().double()
    twin = copy.deepcopy(model)
    keywords: dict[str, Any] = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer = paper.AdamW(model.named_parameters(), rank=40, axis=axis, update_proj_gap=1000, **keywords)
    reference = torch.optim.AdamW(twin.parameters(), **keywords)
    compiled = torch.compile(model, backend="grass", options={"compiler": compiler})
    steps(compiled, optimizer, 20, dtype=torch.float64)
    steps(twin, reference, 20, dtype=torch.float64)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
    for index in (0, 3):
        state, expected = optimizer.state[model[index].weight], reference.state[twin[index].weight]
        torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], rtol=1e-10, atol=1e-14)
        assert float(state["step"]) == 20


@every_pair(axis=["rows", "columns"], on_refresh=["reset", "carry"], weight_decay=[0.0, 0.1])
def test_refresh_equals_oracle(axis: str, on_refresh: str, weight_decay: float) -> None:
    torch.manual_seed(1)
    model = forms.Linear().double()
    keywords = dict(on_refresh=on_refresh, weight_decay=weight_decay, eps=1e-6, scale=0.5)
    run = pair(model, [forms.batch(torch.float64)], rank=forms.RANK, axis=axis, **keywords)
    kept = 0
    for step in range(11):
        before = set(run.optimizer.state[model.w].get("index", torch.zeros(0)).tolist())
        run.step(lambda y: y.square().sum(), forms.batch(torch.float64, seed=step))
        after = set(run.optimizer.state[model.w]["index"].tolist())
        kept += 0 < len(before & after) < forms.RANK
        assert run.difference() < 1e-12
    assert kept, "no refresh kept some rows and dropped others, so carrying was not tested"
    if on_refresh == "carry":
        assert run.optimizer.state[model.w]["step"].shape == (forms.RANK,)
        assert run.optimizer.state[model.w]["step"].tolist() == run.oracle.state["w"].steps.tolist()


def test_bias_correction_is_right_after_a_refresh() -> None:
    run = pair(forms.Linear().double(), [forms.batch(torch.float64)], rank=4, axis="rows", update_proj_gap=2)
    for step in range(5):
        run.step(forms.loss_of, forms.batch(torch.float64, seed=step))
        assert float(run.optimizer.state[run.model.w]["step"]) == step % 2 + 1
    assert run.difference() < 1e-12


def test_rule_keeps_digits_at_the_first_step() -> None:
    rule = AdamWRule()
    values = rule.hyper({"lr": 1.0, "betas": (0.9, 0.999), "eps": 0.0})
    hyper = dict(zip(rule.hyper_names, torch.tensor(values), strict=True))
    gradient = torch.tensor([[0.5, -3.0]])
    zero = torch.zeros_like(gradient)
    update, _ = rule.update(gradient, {"exp_avg": zero, "exp_avg_sq": zero, "step": torch.tensor(1.0)}, hyper)
    torch.testing.assert_close(update, gradient.sign(), rtol=3e-7, atol=0)


def test_groups_override_keywords() -> None:
    model = mlp()
    groups = [
        {"params": list(model[0].named_parameters()), "rank": 3, "axis": "columns", "lr": 1e-3},
        {"params": list(model[2].named_parameters()) + list(model[3].named_parameters()), "rank": 5, "axis": "rows"},
    ]
    optimizer = paper.AdamW(groups, lr=1e-2)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    loss(compiled(torch.randn(7, 24))).backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (40, 3)
    assert optimizer.state[model[3].weight]["exp_avg"].shape == (5, 40)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_dense_rest_is_torch_adamw() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=None)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    steps(compiled, optimizer, 3)
    steps(twin, reference, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert set(optimizer.state[p]) == set(reference.state[q])


def test_state_dict_resumes_bit_for_bit(tmp_path: Any) -> None:
    def fresh() -> tuple[nn.Module, grass_compile.AdamW, Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = mlp()
        optimizer = paper.AdamW(model.named_parameters(), lr=1e-2, rank=6, update_proj_gap=3, on_refresh="carry")
        return model, optimizer, torch.compile(model, backend="grass", options={"compiler": "aot_eager"})

    whole, first, second = fresh(), fresh(), fresh()
    steps(whole[2], whole[1], 9)
    steps(first[2], first[1], 5)
    torch.save({"model": first[0].state_dict(), "optimizer": first[1].state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second[0].load_state_dict(saved["model"])
    second[1].load_state_dict(saved["optimizer"])
    steps(second[2], second[1], 4, first=5)
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert second[1].state[second[0][0].weight]["index"].dtype is torch.int64


def test_state_of_another_rank_is_refused_and_changes_nothing() -> None:
    model = mlp()
    optimizer = paper.AdamW(model.named_parameters(), rank=6)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    loss(compiled(torch.randn(7, 24))).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = paper.AdamW(mlp().named_parameters(), rank=5)
    with pytest.raises(grass_compile.StateError, match=r"0\.weight: the loaded state was made with rank=6, .* with rank=5"):
        other.load_state_dict(saved)
    assert not other.state
    for group in saved["param_groups"]:
        group["rank"] = 5  # the groups lie: the tensors do not fit
    with pytest.raises(grass_compile.StateError, match=r"0\.weight: the loaded state has rank 6"):
        other.load_state_dict(saved)
    assert not other.state


def test_schedulers_change_lr_without_a_recompilation() -> None:
    run = pair(forms.Linear().double(), [forms.batch(torch.float64)], rank=4, axis="rows", weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 12)
    run.step(forms.loss_of, forms.batch(torch.float64))
    run.step(forms.loss_of, forms.batch(torch.float64))
    graphs = torch._dynamo.utils.counters["aot_autograd"]["total"]
    for step in range(10):
        scheduler.step()
        run.oracle.lr = run.optimizer.param_groups[0]["lr"]
        run.step(forms.loss_of, forms.batch(torch.float64, seed=step))
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == graphs
    assert run.difference() < 1e-12

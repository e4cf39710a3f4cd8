"""Muon: against its formula row by row, and against ``torch.optim.Muon``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile import ConfigError
from grass_compile.optim.rules import MuonRule
from grass_compile.optim.rules.muon import is_by_gram, iteration_dtype, orthogonalize

from .. import paper
from ..compact import Net, State, backward, check
from ..pairs import every_pair

AXES = ("rows", "columns")
NEAR = 1e-9 if iteration_dtype(torch.device("cpu")) == torch.bfloat16 else 1e-6
"""In bf16, both sides round to the very same numbers; in fp32, what they round differs in its last digit."""
KEYWORDS: dict[str, Any] = dict(lr=1e-2, momentum=0.9)


def muon(lr: float, nesterov: bool) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
    """The iteration on singular values, which an SVD finds: it leaves the singular vectors alone."""

    def formula(gradient: Tensor, state: State, steps: Tensor) -> tuple[Tensor, State]:
        m = 0.9 * state.get("m", torch.zeros_like(gradient)) + 0.1 * gradient
        ahead = 0.9 * m + 0.1 * gradient if nesterov else m
        return lr * 0.2 * max(gradient.shape) ** 0.5 * orthogonalized(ahead), {"m": m}

    return formula


def orthogonalized(matrix: Tensor) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("axis", AXES)
def test_full_rank_equals_the_formula(axis: str, nesterov: bool) -> None:
    rule = MuonRule(nesterov, dtype=torch.float64)
    check(rule, muon(1e-2, nesterov), axis=axis, rank=24, gap=100, steps=15, **KEYWORDS)


@every_pair(axis=AXES, on_refresh=["reset", "carry", "keep"], deferred=[False, True])
def test_selected_rows_equal_the_formula(axis: str, on_refresh: str, deferred: bool) -> None:
    keywords = {**KEYWORDS, "step_in_backward": not deferred, "on_refresh": on_refresh}
    model, optimizer = check(MuonRule(dtype=torch.float64), muon(1e-2, True), axis=axis, **keywords)
    state, (m, n) = optimizer.state[model.a.weight], model.a.weight.shape
    assert state["momentum_buffer"].shape == ((8, n) if axis == "rows" else (m, 8))
    assert "exp_avg" not in state and "exp_avg_sq" not in state


@pytest.mark.inductor
@pytest.mark.parametrize("axis", ["rows", pytest.param("columns", marks=pytest.mark.exhaustive)])
def test_selected_rows_equal_the_formula_under_inductor(axis: str) -> None:
    keywords = {**KEYWORDS, "on_refresh": "carry", "compiler": "inductor"}
    check(MuonRule(dtype=torch.float64), muon(1e-2, True), axis=axis, steps=7, **keywords)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="grass", options={"compiler": "aot_eager"})


def advance(forward: Any, optimizers: list[Any], step: int) -> None:
    backward(forward, step)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def same_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without bf16, ``torch.optim.Muon`` iterates in fp32 too."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda matrix: matrix.to(iteration_dtype(matrix.device)))


@pytest.mark.usefixtures("same_dtype")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("axis", AXES)
def test_full_rank_equals_torch(axis: str, nesterov: bool) -> None:
    """Also in the iterations' bf16: in fp64 everything else agrees so well that both round to the same. The bias is AdamW's."""
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    decay = dict(lr=1e-2, weight_decay=0.1)
    optimizer = paper.Muon(
        model.named_parameters(), **decay, momentum=0.9, nesterov=nesterov, rank=24, axis=axis, update_proj_gap=100
    )
    weights, biases = [twin.a.weight, twin.b.weight], [twin.a.bias]
    muon = torch.optim.Muon(weights, **decay, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    rest, forward = torch.optim.AdamW(biases, **decay), compiled(model)
    for step in range(20):
        advance(forward, [optimizer], step)
        advance(twin, [muon, rest], step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert float((p - q).detach().abs().max()) < NEAR, step


@pytest.mark.parametrize("shape", [(8, 100), (100, 8), (16, 16), (1, 50)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert float(values.max()) < 1.25 and float(values.median()) > 0.65
    assert torch.equal(orthogonalize(matrix.t(), 5), orthogonalize(matrix, 5).t()) or shape == (16, 16)


@pytest.mark.parametrize(("shape", "by_gram"), [((8, 100), True), ((60, 100), True), ((100, 60), True), ((80, 100), False)])
def test_iterations_in_fp32(shape: tuple[int, int], by_gram: bool) -> None:
    """On the matrix or on its products, whichever is less work; singular values from 1 to 1e-4."""
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = (u @ torch.diag(torch.logspace(0, -4, min(shape), dtype=torch.float64)) @ vt).float()
    assert is_by_gram(matrix if shape[0] < shape[1] else matrix.t()) == by_gram
    expected = orthogonalized(matrix.double())
    assert float((orthogonalize(matrix, 5) - expected).norm() / expected.norm()) < (1e-3 if by_gram else 1e-4)


@pytest.mark.parametrize("axis", AXES)
def test_the_update_is_as_long_as_promised(axis: str) -> None:
    """A root mean square of about ``0.2 lr`` on the columns that move, and none elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    optimizer = paper.Muon(model.named_parameters(), lr=1e-2, rank=16, axis=axis, selection="uniform")
    before, forward = model[0].weight.detach().clone(), compiled(model)
    forward(torch.randn(200, 64)).square().mean().backward()
    optimizer.step()
    moved = (model[0].weight.detach() - before) if axis == "rows" else (model[0].weight.detach() - before).t()
    index = optimizer.state[model[0].weight]["index"]
    size = float(moved[index].square().mean().sqrt()) / 1e-2
    assert 0.14 < size < 0.24
    assert moved.any(dim=1).nonzero().flatten().tolist() == sorted(index.tolist())


@pytest.mark.usefixtures("same_dtype")
def test_momentum_changes_without_a_recompilation() -> None:
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    optimizer = paper.Muon(model.named_parameters(), momentum=0.5, rank=24, axis="rows", update_proj_gap=100)
    weights = [twin.a.weight, twin.b.weight]
    muon = torch.optim.Muon(weights, momentum=0.5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest, forward = torch.optim.AdamW([twin.a.bias], lr=1e-3, weight_decay=0.0), compiled(model)
    graphs = 0
    for step in range(6):
        optimizer.param_groups[0]["momentum"] = muon.param_groups[0]["momentum"] = 0.5 + 0.05 * step
        advance(forward, [optimizer], step)
        advance(twin, [muon, rest], step)
        graphs = graphs or (step == 2 and torch._dynamo.utils.counters["aot_autograd"]["total"])
    assert graphs and torch._dynamo.utils.counters["aot_autograd"]["total"] == graphs
    assert all(float((p - q).detach().abs().max()) < NEAR for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_training_and_resuming() -> None:
    torch.manual_seed(0)
    model = Net()

    def make(net: nn.Module) -> tuple[Any, Any]:
        keywords: dict[str, Any] = dict(rank=8, axis="columns", update_proj_gap=5, on_refresh="carry", selection="uniform")
        return paper.Muon(net.named_parameters(), lr=2e-2, **keywords), compiled(net)

    def train(optimizer: Any, forward: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(backward(forward, step, torch.float32))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    optimizer, forward = make(model)
    losses = train(optimizer, forward, range(40))
    assert losses[-1] < 0.5 * losses[0]
    resumed = copy.deepcopy(model)
    again, other = make(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(optimizer, forward, range(40, 46))
    torch._dynamo.reset()
    assert train(again, other, range(40, 46)) == expected


def test_zero_gradients_do_nothing() -> None:
    model = nn.Linear(12, 8, bias=False)
    before = model.weight.detach().clone()
    optimizer = paper.Muon(model.named_parameters(), rank=4, axis="rows")
    forward = compiled(model)
    for _ in range(2):
        (forward(torch.ones(3, 12)) * 0.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.weight, before)


def test_refusals() -> None:
    parameters = dict(nn.Linear(4, 4).named_parameters()).items()
    with pytest.raises(ConfigError, match="ns_steps must be a whole number of at least 1, got 0"):
        paper.Muon(parameters, ns_steps=0)
    with pytest.raises(ConfigError, match=r"Muon: momentum must be in \[0, 1\), got 1.0"):
        paper.Muon(parameters, momentum=1.0)
    group = {"params": list(parameters), "momentum": -0.5}
    with pytest.raises(ConfigError, match=r"Muon: momentum must be in \[0, 1\), got -0.5"):
        paper.Muon([group])

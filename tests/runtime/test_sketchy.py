"""Sketchy: against the paper's formulas with full matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile import ConfigError
from grass_compile.optim.rules import SketchyRule
from grass_compile.optim.rules.contrib.sketchy import leading

from .. import paper
from ..compact import Net, State, backward, check
from ..pairs import every_pair

AXES = ("rows", "columns")
KEYWORDS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
SHARED = ("S", "rho", "total")


def sketchy(lr: float, size: int) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
    """Algorithms 1 and 2 of arXiv 2302.03764, with the preconditioner ``[n, n]`` formed and inverted by an SVD."""

    def formula(gradient: Tensor, state: State, steps: Tensor) -> tuple[Tensor, State]:
        n = gradient.shape[1]
        nothing = torch.zeros(n, n, dtype=gradient.dtype)
        covariance = 0.99 * state.get("S", nothing) + gradient.T @ gradient
        u, s, _ = torch.linalg.svd(covariance)
        s[s < 1e-12 * s[0]] = 0
        cutoff = s[size] if n > size else torch.tensor(0.0)
        sketch = u[:, :size] @ torch.diag((s[:size] - cutoff).clamp(min=0)) @ u[:, :size].T
        rho = 0.99 * state.get("rho", torch.tensor(0.0)) + cutoff
        total = 0.99 * state.get("total", torch.tensor(0.0)) + 1
        u, s, _ = torch.linalg.svd(sketch + rho * torch.eye(n, dtype=s.dtype))
        root = torch.where(s > 1e-12 * s[0], 1 / ((s / total).sqrt() + 1e-8), 0.0)
        m = 0.9 * state.get("m", torch.zeros_like(gradient)) + 0.1 * gradient
        update = m / (1 - 0.9**steps) @ u @ torch.diag(root) @ u.T
        return lr * update, {"m": m, "S": sketch, "rho": rho, "total": total}

    return formula


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("axis", AXES)
def test_full_rank_equals_the_formula(axis: str, size: int) -> None:
    check(SketchyRule(size), sketchy(1e-2, size), axis=axis, rank=24, gap=100, steps=15, shared=SHARED, **KEYWORDS)


@every_pair(axis=AXES, on_refresh=["reset", "carry", "keep"], deferred=[False, True])
def test_selected_rows_equal_the_formula(axis: str, on_refresh: str, deferred: bool) -> None:
    """The first moments go with their rows; the sketch is of the features, and stays unless all is reset."""
    keywords = {**KEYWORDS, "step_in_backward": not deferred, "on_refresh": on_refresh}
    model, optimizer = check(SketchyRule(3), sketchy(1e-2, 3), axis=axis, shared=SHARED, **keywords)
    state, (m, n) = optimizer.state[model.a.weight], model.a.weight.shape
    assert state["sketch"].shape == (3, n if axis == "rows" else m)
    assert state["escaped"].shape == state["total"].shape == (1,) and float(state["escaped"]) > 0


@pytest.mark.inductor
@pytest.mark.exhaustive
@pytest.mark.parametrize("axis", ["rows"])
def test_selected_rows_equal_the_formula_under_inductor(axis: str) -> None:
    keywords = {**KEYWORDS, "on_refresh": "carry", "compiler": "inductor"}
    check(SketchyRule(3), sketchy(1e-2, 3), axis=axis, steps=7, shared=SHARED, **keywords)


@pytest.mark.parametrize(("rows", "features"), [(9, 30), (30, 9), (9, 9)])
def test_leading_eigenvalues(rows: int, features: int) -> None:
    stacked = torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, directions, cutoff, _ = leading(stacked, 5)
    expected = torch.linalg.svdvals(stacked) ** 2
    torch.testing.assert_close(values.flip(0), expected[:5])
    torch.testing.assert_close(cutoff, expected[5])
    torch.testing.assert_close(directions @ directions.t(), torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(directions @ stacked.t() @ stacked, values.unsqueeze(1) * directions)


def test_the_sketch_brackets_the_covariance() -> None:
    """What Frequent Directions promises: ``S <= covariance <= S + rho I``, here of gradients over 20 steps."""
    rule = SketchyRule(6)
    hyper = dict(zip(rule.hyper_names, torch.tensor(rule.hyper({**rule.defaults})).double(), strict=True))
    state = {name: rule.seen(name, torch.zeros(rule.shape(name, 8, 20), dtype=torch.float64)) for name in rule.state_names}
    covariance, generator = torch.zeros(20, 20, dtype=torch.float64), torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -2, 20, dtype=torch.float64)
    for step in range(1, 21):
        gradient = torch.randn(8, 20, dtype=torch.float64, generator=generator) * sizes
        covariance = 0.999 * covariance + gradient.T @ gradient
        _, state = rule.update(gradient, {**state, "step": torch.tensor(float(step))}, hyper)
    sketch, escaped = state["sketch"].T @ state["sketch"], float(state["escaped"])
    missing = torch.linalg.eigvalsh(covariance - sketch)
    slack = 1e-6 * float(torch.linalg.eigvalsh(covariance)[-1])  # beta2 is rounded to fp32
    assert float(missing[0]) > -slack and float(missing[-1]) < escaped + slack
    assert 0 < escaped < 0.5 * float(torch.linalg.eigvalsh(covariance)[-1])


def test_zero_gradients_do_nothing() -> None:
    model = nn.Linear(12, 8, bias=False)
    before = model.weight.detach().clone()
    optimizer = paper.Sketchy(model.named_parameters(), rank=4, axis="rows", size=2)
    forward = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for _ in range(2):
        (forward(torch.ones(3, 12)) * 0.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.weight, before)


def test_training_and_resuming() -> None:
    model = Net()

    def make(net: nn.Module) -> tuple[Any, Any]:
        optimizer = paper.Sketchy(
            net.named_parameters(), lr=2e-2, rank=8, axis="columns", size=4, update_proj_gap=5, on_refresh="carry"
        )
        return optimizer, torch.compile(net, backend="grass", options={"compiler": "aot_eager"})

    def train(net: nn.Module, optimizer: Any, forward: Any, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(backward(forward, step, torch.float32))
            optimizer.step()
            optimizer.zero_grad()
        return losses

    optimizer, forward = make(model)
    losses = train(model, optimizer, forward, range(40))
    assert losses[-1] < 0.5 * losses[0]
    resumed = copy.deepcopy(model)
    again, other = make(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(model, optimizer, forward, range(40, 46))
    torch._dynamo.reset()
    assert train(resumed, again, other, range(40, 46)) == expected


def test_refusal() -> None:
    with pytest.raises(ConfigError, match="size must be a whole number of at least 1, got 0"):
        paper.Sketchy(nn.Linear(4, 4).named_parameters(), size=0)

"""APOLLO: against its formula, against the authors' package, and the random directions themselves."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from grass_compile import ConfigError
from grass_compile.math.noise import gaussian
from grass_compile.optim.rules import ApolloRule

from .. import paper
from ..compact import State, backward, check
from ..pairs import every_pair

AXES = ("rows", "columns")
KEYWORDS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-6)


def apollo(lr: float, directions: int, growth: float) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
    """Algorithm 1 of arXiv 2412.05270, row by row."""

    def formula(gradient: Tensor, state: State, steps: Tensor) -> tuple[Tensor, State]:
        noise = gaussian(torch.arange(2), gradient.shape[1], directions, torch.float64)
        projected = gradient @ noise
        m = 0.9 * state.get("m", torch.zeros_like(projected)) + 0.1 * projected
        v = 0.99 * state.get("v", torch.zeros_like(projected)) + 0.01 * projected**2
        adam = m / (v.sqrt() + 1e-6)
        scaled = torch.stack([g * a.norm() / (p.norm() + 1e-8) for g, a, p in zip(gradient, adam, projected, strict=True)])
        if "norm" in state and scaled.norm() > growth * (state["norm"] + 1e-8):
            scaled = scaled * growth * (state["norm"] + 1e-8) / scaled.norm()
        return lr * (1 - 0.99**steps).sqrt() / (1 - 0.9**steps) * scaled, {"m": m, "v": v, "norm": scaled.norm()}

    return formula


@pytest.mark.parametrize("growth", [1.01, float("inf")])
@pytest.mark.parametrize("axis", AXES)
def test_full_rank_equals_the_formula(axis: str, growth: float) -> None:
    check(ApolloRule(4, growth), apollo(1e-2, 4, growth), axis=axis, rank=24, gap=100, steps=15, shared=("norm",), **KEYWORDS)


@every_pair(axis=AXES, on_refresh=["reset", "carry", "keep"], deferred=[False, True])
def test_selected_rows_equal_the_formula(axis: str, on_refresh: str, deferred: bool) -> None:
    """Moments go with their rows; the norm belongs to the weight as a whole."""
    keywords = {**KEYWORDS, "step_in_backward": not deferred, "on_refresh": on_refresh}
    model, optimizer = check(ApolloRule(5), apollo(1e-2, 5, 1.01), axis=axis, shared=("norm",), **keywords)
    state = optimizer.state[model.a.weight]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (8, 5) and state["norm"].shape == (1,)


@pytest.mark.inductor
@pytest.mark.exhaustive
@pytest.mark.parametrize("axis", ["columns"])
def test_selected_rows_equal_the_formula_under_inductor(axis: str) -> None:
    """The directions are in fp32 and depend on the compiler's logarithm and cosine."""
    keywords = {**KEYWORDS, "on_refresh": "carry", "compiler": "inductor"}
    check(ApolloRule(5), apollo(1e-2, 5, 1.01), axis=axis, steps=7, shared=("norm",), tolerance=1e-6, **keywords)


def test_full_rank_equals_the_authors_package() -> None:
    """``apollo_torch`` with our directions in place of its own; rows are its channels where a weight is not wider than high."""
    package = pytest.importorskip("apollo_torch")
    model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 24, bias=False)).double()
    twin = copy.deepcopy(model)
    optimizer = paper.Apollo(model.named_parameters(), lr=1e-2, directions=4, rank=24, axis="rows", update_proj_gap=100)
    group = dict(params=list(twin.parameters()), rank=4, update_proj_gap=1000, scale=1.0, proj="random", proj_type="right")
    reference = package.APOLLOAdamW([{**group, "scale_type": "channel"}], lr=1e-2)
    projector = sys.modules["apollo_torch.random_projector"].GradientProjector
    ours = ApolloRule(4).projection(24, torch.zeros((), dtype=torch.float64)).t()
    forward = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    with mock.patch.object(projector, "get_orthogonal_matrix", return_value=ours):
        for step in range(15):
            for run, opt in ((forward, optimizer), (twin, reference)):
                backward(run, step)
                opt.step()
                opt.zero_grad()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert float((p - q).detach().abs().max()) < 1e-8, step


def test_directions_are_gaussian() -> None:
    noise = 4 * gaussian(torch.arange(2) + 3, 4096, 16, torch.float64)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.var()) - 1) < 0.02
    assert abs(float((noise**4).mean()) - 3) < 0.1 and float(noise.abs().max()) < 6.5
    correlation = noise.T @ noise / 4096 - torch.eye(16, dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / 64  # of 256 numbers of standard deviation 1/64 (diagonal: 1.4/64)
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean(), (noise[1:] * noise[:-1]).mean()
    assert max(abs(float(value)) for value in neighbours) < 0.02
    assert not torch.equal(noise, 4 * gaussian(torch.arange(2) + 4, 4096, 16, torch.float64))


def test_a_row_moves_as_far_as_the_paper_says() -> None:
    """``sqrt(k / n)`` of the norm of Adam's step, which is ``sqrt(n)`` in the first."""
    gradient = torch.randn(500, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = ApolloRule(256)
    hyper = dict(zip(rule.hyper_names, torch.tensor(rule.hyper({**rule.defaults, "lr": 1.0})).double(), strict=True))
    state = {name: torch.zeros(rule.shape(name, 500, 512), dtype=torch.float64) for name in rule.state_names}
    state["norm"] = state["norm"].view(1, 1)
    update, _ = rule.update(gradient, {**state, "step": torch.tensor(1.0)}, hyper)
    sizes = update.norm(dim=1) / 256**0.5
    assert abs(float(sizes.mean()) - 1) < 0.01 and float(sizes.std()) < 0.06  # 1 / sqrt(2 k) = 0.044


def test_refusal() -> None:
    with pytest.raises(ConfigError, match="directions must be a whole number of at least 1, got 0"):
        paper.Apollo(nn.Linear(4, 4).named_parameters(), directions=0)

"""Rows that are chosen without the full gradient: the scores against their formulas, and whole runs against the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grass_compile.errors import ConfigError
from grass_compile.math.noise import rounding_noise
from grass_compile.math.reference import CompactState, ReferenceAdamW
from grass_compile.ops import scores
from grass_compile.passes import pipeline
from grass_compile.runtime.schedule import seed_of
from tests.harness import KEYWORDS

from .. import paper
from ..pairs import every_pair, every_value

RANK, GAP = 4, 3


def expected_energy(how: str, by_output: bool, grad_out: Tensor, x: Tensor, seed: int) -> Tensor:
    """The module's formulas, in double precision."""
    grad_out, x = grad_out.double(), x.double()
    if how == "sampled":
        gradient = grad_out[:: scores.STRIDE].t() @ x[:: scores.STRIDE]
        return (gradient**2).sum(1 if by_output else 0)
    if not by_output:
        return (x**2).sum(0)
    bits = rounding_noise((x.shape[1], scores.SKETCH), torch.tensor(float(seed)))
    signs = torch.where((bits & 2) > 0, 1.0, -1.0).double()
    return ((grad_out.t() @ (x @ signs)) ** 2).sum(1)


def test_sketch_is_unbiased() -> None:
    torch.manual_seed(0)
    grad_out, x = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 10, dtype=torch.float64)
    exact = ((grad_out.t() @ x) ** 2).sum(1)
    hypers = [torch.tensor([float(seed_of(1, step)), 0.0], dtype=torch.float64) for step in range(2000)]
    drawn = torch.stack([scores.sketched_energy(grad_out, x, hyper, scores.DUE[True], []) / scores.SKETCH for hyper in hypers])
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - exact).abs() < 3.5 * error).all()
    assert (drawn.std(0) / exact < 1.1 * (2 / scores.SKETCH) ** 0.5).all()


@pytest.mark.parametrize("by_output", [True, False])
def test_sampled_tokens(by_output: bool) -> None:
    torch.manual_seed(0)
    grad_out, x = torch.randn(30, 6), torch.randn(30, 10)
    own, other = (grad_out, x) if by_output else (scores.sample(x, scores.STRIDE), grad_out)
    found = scores.product_energy(own, other, scores.STRIDE if by_output else 1, scores.STRIDE, [])
    torch.testing.assert_close(found.double(), expected_energy("sampled", by_output, grad_out, x, 0), rtol=1e-5, atol=1e-5)


class ProposingAdamW(ReferenceAdamW):
    """The reference, with rows that are proposed by one step for the next."""

    def __init__(self, model: nn.Sequential, how: str, axis: str, seed: int, **keywords: Any) -> None:
        super().__init__(model.named_parameters(), **keywords)
        self.how, self.by_output, self.seed = how, axis == "rows", seed
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_children():
            module.register_forward_hook(self._watch(f"{name}.weight"))

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            if output.requires_grad and name in self.projected and name not in self.seen:  # the first micro-batch proposes
                self.seen[name] = x, x
                output.register_hook(lambda grad: self.seen.update({name: (grad.detach().flatten(0, -2), x)}))

        return hook

    def due(self, name: str) -> bool:
        return False

    def _projected_step(self, name: str, weight: Tensor, gradient: Tensor, wide: torch.dtype) -> None:
        dim, rank = self.projected[name]
        if self.updates == 0:
            zeros = torch.zeros_like(gradient.narrow(dim, 0, rank), dtype=wide)
            self.state[name] = CompactState(torch.arange(rank), zeros, zeros.clone(), torch.zeros(rank))
        super()._projected_step(name, weight, gradient, wide)
        if self.updates == 0 or (self.updates + 1) % self.update_proj_gap == 0:
            energy = expected_energy(self.how, self.by_output, *self.seen[name], seed_of(self.seed, self.updates))
            stand_in = torch.zeros_like(gradient)
            stand_in.select(1 - dim, 0).copy_(energy.sqrt())
            self.state[name] = self._refreshed(name, stand_in, dim, rank)

    def step(self) -> None:
        super().step()
        self.seen.clear()


def run(how: str, axis: str, micro: int = 1, compiler: str = "aot_eager", steps: int = 8, **keywords: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 9, bias=False))
    twin = copy.deepcopy(model)
    optimizer = paper.AdamW(
        model.named_parameters(), rank=RANK, axis=axis, scores=how, seed=5, **{**KEYWORDS, "update_proj_gap": GAP, **keywords}
    )
    own = {key: keywords[key] for key in ("on_refresh", "weight_decay", "selection") if key in keywords}
    projected = dict.fromkeys(("0.weight", "2.weight"), (0 if axis == "rows" else 1, RANK))
    oracle = ProposingAdamW(
        twin, how, axis, 5, projected=projected, lr=KEYWORDS["lr"], eps=KEYWORDS["eps"], update_proj_gap=GAP, **own
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": compiler})
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for part in range(micro):
            x, y = (torch.randn(3, 11, size, generator=generator) for size in (12, 9))
            for network in (compiled, twin):
                with optimizer.accumulate() if network is compiled and part < micro - 1 else torch.enable_grad():
                    ((network(x) - y) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
        for name in projected:
            state = optimizer.state[model.get_parameter(name)]
            assert state["index"].tolist() == oracle.state[name].index.tolist()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@every_pair(fused=[True, False], on_refresh=["reset", "carry", "keep"], axis=["rows", "columns"], how=["sampled", "estimate"])
def test_against_the_oracle(how: str, axis: str, on_refresh: str, fused: bool) -> None:
    run(how, axis, on_refresh=on_refresh, step_in_backward=fused, weight_decay=0.1)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_accumulation(axis: str) -> None:
    run("sampled", axis, micro=3, on_refresh="carry")


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("how", "axis"),
    [(how, axis) if (how, axis) == ("estimate", "rows") else pytest.param(how, axis, marks=pytest.mark.exhaustive)
     for how in ("sampled", "estimate") for axis in ("columns", "rows")],
)  # fmt: skip
def test_generated_code(how: str, axis: str) -> None:
    run(how, axis, compiler="inductor", steps=5)


@pytest.mark.parametrize("gap", [1, 5])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_an_estimate_is_part_of_every_step(axis: str, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backward serves all steps, of weights that refresh at steps of their own; only then is anything scored."""
    backwards: list[Any] = []
    scored: list[tuple[int, ...]] = []
    finish, energy = pipeline.finish_backward, scores._energy

    def watched(gm: Any, plan: Any, key: Any, saved: Any) -> Any:
        backwards.append(key)
        return finish(gm, plan, key, saved)

    def watched_energy(features: Tensor, dim: int = 0) -> Tensor:
        scored.append(tuple(features.shape))
        return energy(features, dim)

    monkeypatch.setattr(pipeline, "finish_backward", watched)
    monkeypatch.setattr(scores, "_energy", watched_energy)
    torch.manual_seed(0)
    model = Block()
    keywords: dict[str, Any] = dict(selection="norm", scores="estimate", update_proj_gap=gap, stagger=True, seed=0)
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis=axis, **keywords)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    weights = [model.up.weight, model.down.weight]
    index: list[list[int]] = [[], []]
    changes: list[list[int]] = [[], []]
    for step in range(15):
        compiled(torch.randn(4, 5, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for number, weight in enumerate(weights):
            new = optimizer.state[weight]["index"].tolist()
            if new != index[number]:
                changes[number].append(step)
            index[number] = new
    assert len(backwards) == 1, backwards
    assert len(scored) == len(changes[0]) + len(changes[1])
    if gap > 1:
        assert all(len(steps) == 4 for steps in changes)  # after the first step, and thrice in fifteen
        assert not set(changes[0][1:]) & set(changes[1][1:])


class Block(nn.Module):
    """Two linear layers, whose activations may be computed again in the backward."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(16, 32), nn.Linear(32, 16), again

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]

        return x + (checkpoint(inner, x, use_reentrant=False) if self.again else inner(x))  # type: ignore[no-any-return]


def chosen_and_trained(how: str, axis: str, again: bool = False, **keywords: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Six steps; the rows of each, and the weights after the last."""
    torch.manual_seed(0)
    model = Block(again)
    own: dict[str, Any] = dict(rank=RANK, axis=axis, scores=how, update_proj_gap=2, seed=1, on_refresh="carry", lr=1e-2)
    optimizer = paper.AdamW(model.named_parameters(), **{**own, **keywords})
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    rows = []
    for step in range(6):
        compiled(torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rows += [optimizer.state[layer.weight]["index"].tolist() for layer in (model.up, model.down)]
    return rows, [parameter.detach() for parameter in model.parameters()]


@every_value(how=["sampled", "estimate"], axis=["columns", "rows"])
def test_recomputed_activations_choose_the_same_rows(how: str, axis: str) -> None:
    rows, weights = chosen_and_trained(how, axis)
    assert len({tuple(index) for index in rows}) > 2
    runs = [chosen_and_trained(how, axis, again=True)]
    for budget in (0.0, 0.3):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            torch._dynamo.reset()
            runs.append(chosen_and_trained(how, axis))
    for other_rows, other_weights in runs:
        assert other_rows == rows
        for one, other in zip(weights, other_weights, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", ["sampled", "estimate"])
def test_unmodified_script(how: str) -> None:
    """An adopted optimizer chooses by the full gradient that its first step finds, then by scores."""
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    options = {**paper.OPTIONS, "compiler": "aot_eager", "rank": RANK, "axis": "columns", "scores": how, "update_proj_gap": 2}
    compiled = torch.compile(model, backend="grass", options=options)
    seen = set()
    for step in range(8):
        before = model.up.weight.detach().clone()
        compiled(torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(step)) * torch.rand(16)).square().mean().backward()
        index = model.up.weight.grad.rows.tolist() if step else None  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        if index is not None:
            moved = (model.up.weight.detach() - before).abs().sum(0).nonzero().flatten().tolist()
            assert moved == index
            seen.add(tuple(index))
    assert len(seen) > 2


def test_unknown_scores() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'estimate'"):
        paper.AdamW(nn.Linear(8, 8).parameters(), rank=2, scores="estimated")


class ThreeReaders(nn.Module):
    """Three weights that read the same activations, as one node of the graph or as three of equal values."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, out, bias=False) for out in (16, 8, 8))
        for name in "xyz":
            self.register_buffer(name, torch.ones(()))
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (x * one for one in (self.x, self.y, self.z)) if self.apart else (x, x, x)
        return self.a(a).sin() * torch.cat((self.b(b), self.c(c)), -1)


@every_pair(disable=[(), ("normalize",)], axis=["columns", "rows"], scores=["sampled", "estimate"])
def test_staggered_weights_that_read_the_same_activations(disable: tuple[str, ...], axis: str, scores: str) -> None:
    """What the forward computes for the scores of one of them it computes for the others, of which some choose no rows yet."""
    weights = []
    for apart in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = ThreeReaders(apart)
        keywords: dict[str, Any] = dict(selection="norm", scores=scores, axis=axis, update_proj_gap=6, stagger=True, seed=3)
        optimizer = paper.AdamW(model.named_parameters(), rank=4, lr=1e-2, **keywords)
        compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", "disable_passes": disable})
        for step in range(20):
            compiled(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all("index" in state for state in optimizer.state.values())
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)

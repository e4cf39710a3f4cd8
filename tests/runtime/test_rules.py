"""Update rules: each against its public reference at full rank, states by layout, rules of one's own, rules that break their
word."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError, GraphError
from grass_compile.optim.rules import AdafactorRule, StateLayout, sonew
from tests.compact import Net

from .. import paper
from ..pairs import every_pair, every_value

AXES = ("rows", "columns")


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(7, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(out: Tensor) -> Tensor:
    return (out - 1.0).square().mean()


def compiled(model: nn.Module, compiler: str = "aot_eager") -> Any:
    return torch.compile(model, backend="grass", options={"compiler": compiler})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Any, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        loss_of(forward(batch(step, dtype))).backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True))


class EagerLion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675, line by line."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            assert p.grad is not None
            m = self.state[p].setdefault("m", torch.zeros_like(p))
            c = beta1 * m + (1 - beta1) * p.grad
            p.sub_(group["lr"] * (c.sign() + group["weight_decay"] * p))
            m.copy_(beta2 * m + (1 - beta2) * p.grad)


Make = Callable[..., torch.optim.Optimizer]
PAIRS: dict[str, tuple[Make, Make, dict[str, Any]]] = {
    "SGD": (paper.SGD, torch.optim.SGD, dict(lr=0.05, weight_decay=0.1)),
    "SGD momentum": (paper.SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    "SGD nesterov": (paper.SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
    "Adafactor": (paper.Adafactor, torch.optim.Adafactor, dict(lr=0.05, eps=(1e-12, 1e-3), weight_decay=0.1)),
    "Lion": (paper.Lion, EagerLion, dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)),
    "AdamW": (paper.AdamW, torch.optim.AdamW, dict(lr=1e-2, eps=1e-3, weight_decay=0.1)),
}


@every_pair(name=PAIRS, axis=AXES, deferred=[False, True])
def test_full_rank_equals_the_reference(name: str, axis: str, deferred: bool) -> None:
    ours, theirs, keywords = PAIRS[name]
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    optimizer = ours(model.named_parameters(), **keywords, rank=24, axis=axis, update_proj_gap=100, step_in_backward=not deferred)
    reference = theirs(twin.parameters(), **keywords)
    forward = compiled(model)
    for step in range(20):
        train(model, optimizer, forward, range(step, step + 1))
        train(twin, reference, twin, range(step, step + 1))
        assert difference(model, twin) < 1e-9, step
    assert all("index" in optimizer.state[p] for p in (model.a.weight, model.b.weight))


@pytest.mark.inductor
@every_value(name=["SGD momentum", "Adafactor", "Lion"], axis=AXES)
def test_full_rank_under_inductor(name: str, axis: str) -> None:
    ours, theirs, keywords = PAIRS[name]
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    optimizer = ours(model.named_parameters(), **keywords, rank=24, axis=axis, update_proj_gap=100)
    train(model, optimizer, compiled(model, "inductor"), range(6))
    train(twin, theirs(twin.parameters(), **keywords), twin, range(6))
    assert difference(model, twin) < 1e-9


@pytest.mark.parametrize("axis", AXES)
def test_adafactor_keeps_vectors(axis: str) -> None:
    model = Net()
    optimizer = paper.Adafactor(model.named_parameters(), rank=4, axis=axis)
    train(model, optimizer, compiled(model), range(2))
    state, (m, n) = optimizer.state[model.a.weight], model.a.weight.shape
    assert state["row_var"].shape == (4,) and state["col_var"].shape == ((n,) if axis == "rows" else (m,))


@every_value(on_refresh=["reset", "carry", "keep"], axis=AXES, name=PAIRS)
def test_state_follows_the_rows(name: str, axis: str, on_refresh: str) -> None:
    """What a refresh does to each tensor, by its layout; in the backward and where it waits for the step alike."""
    ours, _, keywords = PAIRS[name]
    results = []
    for deferred in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Net().double()
        optimizer = ours(
            model.named_parameters(), **keywords, rank=8, axis=axis, update_proj_gap=3, on_refresh=on_refresh, selection="norm",
            seed=1, step_in_backward=not deferred,
        )  # fmt: skip
        forward = compiled(model)
        for step in range(10):
            before = {key: copy.deepcopy(value) for key, value in optimizer.state[model.a.weight].items()}
            train(model, optimizer, forward, range(step, step + 1))
            state = optimizer.state[model.a.weight]
            if step == 3 and not deferred:
                old, new = before["index"].tolist(), state["index"].tolist()
                assert set(old) != set(new) and set(old) & set(new)
                if on_refresh == "carry":
                    kept = torch.tensor([row in old for row in new])
                    assert torch.equal(state["step"], torch.where(kept, 4.0, 1.0))
                else:
                    assert float(state["step"]) == (1 if on_refresh == "reset" else 4)
        results.append((model, optimizer))
    (one, fused), (other, waiting) = results
    assert difference(one, other) < 1e-12
    for key, value in fused.state[one.a.weight].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, waiting.state[other.a.weight][key], rtol=1e-9, atol=1e-12)


def test_factored_state_is_carried_by_layout() -> None:
    """One number for each selected row goes with its row; what rows have in common stays."""
    from grass_compile.math.refresh import settled

    old, new = torch.tensor([1, 4, 6]), torch.tensor([0, 4, 6])
    full, selected, others = torch.arange(1.0, 7.0).view(3, 2), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7.0, 8.0])
    state = settled("carry", "sfo", 8, 0, old, new, [selected, full, others])
    assert state[0].tolist() == [0.0, 2.0, 3.0]
    assert state[1].tolist() == [[0.0, 0.0], [3.0, 4.0], [5.0, 6.0]]
    assert state[2].tolist() == [7.0, 8.0]
    assert [t.tolist() for t in settled("keep", "so", 8, 0, old, new, [selected, others])] == [[1, 2, 3], [7, 8]]
    assert not any(bool(t.any()) for t in settled("reset", "sfo", 8, 0, old, new, [selected, full, others]))
    columns = settled("carry", "f", 8, 1, old, new, [full.t().contiguous()])
    assert torch.equal(columns[0], state[1].t())


# --------------------------------------------------------------------------------------------- a rule of one's own


@dataclasses.dataclass(frozen=True)
class RMSprop(grass_compile.Rule):
    """The worked example of docs/rules.md."""

    state_names: ClassVar[tuple[str, ...]] = ("square_avg",)
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "alpha", "eps")
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8}

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        square_avg = hyper["alpha"] * state["square_avg"] + (1 - hyper["alpha"]) * compact_grad * compact_grad
        return hyper["lr"] * compact_grad / (square_avg.sqrt() + hyper["eps"]), {"square_avg": square_avg}


@pytest.mark.parametrize("named", [False, True])
def test_a_rule_of_ones_own(named: bool) -> None:
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    if named:
        grass_compile.register_rule("rmsprop", RMSprop())
    rule = "rmsprop" if named else RMSprop()
    optimizer = paper.Optimizer(model.named_parameters(), rule, alpha=0.9, rank=24, axis="rows", update_proj_gap=100)
    train(model, optimizer, compiled(model), range(8))
    train(twin, torch.optim.RMSprop(twin.parameters(), lr=1e-2, alpha=0.9), twin, range(8))
    assert difference(model, twin) < 1e-9


def test_state_dict_of_a_rule_resumes() -> None:
    torch.manual_seed(0)
    start = Net()
    runs = []
    for stop in (9, 4):
        model = copy.deepcopy(start)
        optimizer = paper.Optimizer(model.named_parameters(), "adafactor", rank=4, axis="rows", update_proj_gap=3)
        torch._dynamo.reset()
        train(model, optimizer, compiled(model), range(stop))
        runs.append((model, optimizer))
    model, optimizer = runs[1]
    resumed = copy.deepcopy(model)
    again = paper.Optimizer(resumed.named_parameters(), "adafactor", rank=4, axis="rows", update_proj_gap=3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch._dynamo.reset()
    train(resumed, again, compiled(resumed), range(4, 9))
    assert difference(resumed, runs[0][0]) == 0.0


class Broken(RMSprop):
    """Breaks its word in a way that a test chooses."""

    how: ClassVar[str] = ""

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        update, new = compact_grad * hyper["lr"], {"square_avg": state["square_avg"] + 1}
        if self.how == "shape":
            new["square_avg"] = new["square_avg"].sum(0)
        if self.how == "dtype":
            new["square_avg"] = new["square_avg"].half()
        if self.how == "number":
            new["another"] = update
        if self.how == "mutates":
            compact_grad.mul_(2)
        if self.how == "untraceable":
            raise ValueError(f"the largest is {float(compact_grad.max())}")  # the line that is named
        return update, new


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"Broken .*test_rules\.py:\d+\): update\(\) returns 'square_avg' of shape \[16\]"),
        ("dtype", r"Broken .*: update\(\) returns 'square_avg' .*float16; it has to be of shape \[4, 16\] and torch\.float32"),
        ("number", r"Broken .*: update\(\) returns the states \['another', 'square_avg'\], its state_names are \['square_avg'\]"),
        ("mutates", r"Broken .*: update\(\) changes its arguments in place"),
        ("untraceable", r"Broken .*test_rules\.py:\d+\): update\(\) cannot be traced"),
    ],
)
def test_a_broken_rule_is_named(how: str, message: str) -> None:
    rule = type("Broken", (Broken,), {"how": how, "update": Broken.update})()
    model = Net()
    before = copy.deepcopy(model)
    optimizer = paper.Optimizer(model.named_parameters(), rule, rank=4, axis="rows")
    with pytest.raises(GraphError, match=message) as caught:
        train(model, optimizer, compiled(model), range(1))
    if how == "untraceable":
        lines = pathlib.Path(__file__).read_text().splitlines()
        line = int(str(caught.value).split("test_rules.py:")[1].split(")")[0])
        assert "the line that is named" in lines[line - 1]
    assert difference(model, before) == 0.0


def test_unknown_rule_and_keyword() -> None:
    parameters = dict(Net().named_parameters())
    with pytest.raises(ConfigError, match=r"rule='lyon' is not known\. Did you mean 'lion'"):
        paper.Optimizer(parameters.items(), "lyon")
    with pytest.raises(ConfigError, match=r"rule must be a grass_compile\.Rule or the name of one, got int"):
        paper.Optimizer(parameters.items(), 3)  # type: ignore[arg-type]
    taken = type("Taken", (RMSprop,), {"state_names": ("square_avg", "weight")})()
    with pytest.raises(ConfigError, match="Taken: the state name 'weight' is taken; choose another one"):
        paper.Optimizer(parameters.items(), taken)
    with pytest.raises(ConfigError, match=r"Lion: rnk=4 is not one of its keywords. Did you mean 'rank'"):
        paper.Lion(parameters.items(), rnk=4)
    for keywords, message in (
        ({"lr": -1.0}, "Lion: lr must not be negative"),
        ({"lr": float("nan")}, "Lion: lr must be a finite number"),
        ({"weight_decay": -0.1}, "Lion: weight_decay must not be negative"),
        ({"betas": (0.9, 1.0)}, r"Lion: betas must be in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            paper.Lion(parameters.items(), **keywords)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="SGD: Nesterov momentum requires a momentum"):
        paper.SGD(parameters.items(), nesterov=True)


def test_layouts_are_what_the_rules_say() -> None:
    rule = AdafactorRule()
    layouts: dict[str, StateLayout] = {name: rule.layout(name) for name in rule.state_names}
    assert layouts == {"row_var": "selected", "col_var": "others"} and not rule.elementwise
    assert RMSprop().layout("square_avg") == "full" and RMSprop().elementwise


# ------------------------------------------------------------------------------------------------------------- SONew


def explicit_sonew(vector: Tensor, diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
    """Theorem 3.1 of arXiv 2311.10085 with matrices: ``L D L^T v``."""
    n = len(vector)
    lower, inverse = torch.eye(n, dtype=vector.dtype), torch.zeros(n, dtype=vector.dtype)
    for j in range(n - 1):
        lower[j + 1, j] = -off_diagonal[j] / diagonal[j + 1]
        inverse[j] = 1 / (diagonal[j] - off_diagonal[j] ** 2 / diagonal[j + 1])
    inverse[n - 1] = 1 / diagonal[n - 1]
    return lower @ torch.diag(inverse) @ lower.T @ vector


def test_sonew_preconditioner_equals_the_theorem() -> None:
    """Also: the tridiagonal part of its inverse is that of the statistics, which is what the theorem asks for."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(50, 2, 9, generator=generator, dtype=torch.float64).cumsum(2)
    vector = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    diagonal = samples.square().mean(0)
    off_diagonal = torch.nn.functional.pad((samples[..., :-1] * samples[..., 1:]).mean(0), (0, 1))
    found = sonew.precondition(vector, diagonal, off_diagonal, 0.0, 0.0)
    for row in range(2):
        torch.testing.assert_close(found[row], explicit_sonew(vector[row], diagonal[row], off_diagonal[row]))
    matrix = torch.stack([explicit_sonew(unit, diagonal[0], off_diagonal[0]) for unit in torch.eye(9, dtype=torch.float64)], 1)
    inverse = torch.linalg.inv(matrix)
    torch.testing.assert_close(inverse.diagonal(), diagonal[0])
    torch.testing.assert_close(inverse.diagonal(1), off_diagonal[0, :-1])


def test_sonew_leaves_degenerate_edges_out() -> None:
    """Two neighbours that are always equal have no conditional variance; the step stays finite and falls back to the diagonal."""
    vector = torch.ones(1, 4, dtype=torch.float64)
    diagonal = torch.ones(1, 4, dtype=torch.float64)
    found = sonew.precondition(vector, diagonal, torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64), 0.0, 1e-4)
    torch.testing.assert_close(found, vector)


class EagerSONew(torch.optim.Optimizer):
    """The theorem with matrices, row by row (column by column), and the norm of Adam's step."""

    def __init__(self, params: Any, lr: float, dim: int) -> None:
        super().__init__(params, dict(lr=lr))
        self.dim = dim

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            g = p.grad.t() if self.dim else p.grad
            state = self.state[p]
            if not state:
                state.update(t=0, m=torch.zeros_like(g), h=torch.zeros(len(g), g.shape[1], g.shape[1], dtype=g.dtype))
            state["t"] += 1
            state["m"] = 0.9 * state["m"] + 0.1 * g
            state["h"] = 0.99 * state["h"] + 0.01 * g.unsqueeze(2) * g.unsqueeze(1)
            mean, second = state["m"] / (1 - 0.9 ** state["t"]), state["h"] / (1 - 0.99 ** state["t"])
            for row in range(len(g)):
                diagonal, off_diagonal = second[row].diagonal() + 1e-2, second[row].diagonal(1)
                direction = explicit_sonew(mean[row], diagonal, off_diagonal)
                adam = mean[row] / (second[row].diagonal().sqrt() + 1e-2)
                step = self.param_groups[0]["lr"] * direction * adam.norm() / direction.norm()
                (p.t() if self.dim else p)[row].sub_(step)


@pytest.mark.parametrize("axis", AXES)
def test_sonew_equals_its_formula_on_a_quadratic(axis: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 24, bias=False).double()
    twin = copy.deepcopy(model)
    keywords = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-2, gamma=0.0)
    optimizer = paper.Optimizer(model.named_parameters(), "sonew", rank=24, axis=axis, update_proj_gap=100, **keywords)
    forward, reference = compiled(model), EagerSONew(twin.parameters(), 1e-2, 0 if axis == "rows" else 1)
    for step in range(12):
        train(model, optimizer, forward, range(step, step + 1))
        train(twin, reference, twin, range(step, step + 1))
        assert difference(model, twin) < 1e-9, step

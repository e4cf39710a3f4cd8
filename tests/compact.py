"""A rule's formula, eagerly, on the rows that a compiled run has selected: what a state tensor is worth after a refresh is
worked out row by row, and shares no code with `grass_compile.math.refresh`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import grass_compile

from . import paper

State = dict[str, Tensor]
Formula = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]
"""``formula(compact [r, n], state, steps [r, 1])`` gives what is subtracted from the rows, and the new state, of which the first
dimension is that of the rows. A state that is empty is that of the first step."""


class Net(nn.Module):
    """Two linear layers, one with a bias that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 16), nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def backward(forward: Callable[[Tensor], Tensor], step: int, dtype: torch.dtype = torch.float64) -> float:
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    loss = (forward(x) - 1.0).square().mean()
    loss.backward()
    return float(loss.detach())


@dataclasses.dataclass
class Weight:
    """One weight of the eager run.

    Attributes:
        formula: the rule's.
        on_refresh: ``reset``, ``carry`` or ``keep``.
        shared: names of the state that rows have in common.
    """

    formula: Formula
    on_refresh: str
    shared: tuple[str, ...] = ()
    rows: list[int] = dataclasses.field(default_factory=list)
    steps: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.float64))
    state: State = dataclasses.field(default_factory=dict)

    def step(self, weight: Tensor, gradient: Tensor, rows: list[int], fresh: bool) -> None:
        """Move ``rows`` of ``weight [m, n]``, which may be a transposed view."""
        if fresh:
            self._refresh(rows)
        self.rows, self.steps = rows, self.steps + 1
        update, self.state = self.formula(gradient[rows], self.state, self.steps)
        weight[rows] -= update

    def _refresh(self, rows: list[int]) -> None:
        if not self.rows or self.on_refresh == "reset":
            self.state, self.steps = {}, torch.zeros(len(rows), 1, dtype=torch.float64)
        elif self.on_refresh == "carry":
            old = {row: slot for slot, row in enumerate(self.rows)}

            def carried(tensor: Tensor) -> Tensor:
                return torch.stack([tensor[old[row]] if row in old else torch.zeros_like(tensor[0]) for row in rows])

            self.steps = carried(self.steps)
            self.state = {name: t if name in self.shared else carried(t) for name, t in self.state.items()}


def check(
    rule: Any,
    formula: Formula,
    *,
    axis: str,
    on_refresh: str = "reset",
    rank: int = 8,
    gap: int = 3,
    steps: int = 10,
    tolerance: float = 1e-9,
    shared: tuple[str, ...] = (),
    compiler: str = "aot_eager",
    **keywords: Any,
) -> tuple[nn.Module, grass_compile.Optimizer]:
    """Train `Net` with a rule, and a twin with its formula on the same rows; they must agree after every step. Parameters that
    are not projected are trained by the rule as well."""
    torch.manual_seed(0)
    model = Net().double()
    twin = copy.deepcopy(model)
    optimizer = paper.Optimizer(
        model.named_parameters(), rule, rank=rank, axis=axis, update_proj_gap=gap, on_refresh=on_refresh, selection="norm",
        seed=1, **keywords,
    )  # fmt: skip
    forward = torch.compile(model, backend="grass", options={"compiler": compiler})
    weights = {name: Weight(formula, on_refresh, shared) for name, _ in model.named_parameters()}
    chosen: dict[str, set[tuple[int, ...]]] = {}
    for step in range(steps):
        backward(forward, step)
        optimizer.step()
        optimizer.zero_grad()
        backward(twin, step)
        with torch.no_grad():
            for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
                index = optimizer.state[mine].get("index")
                weight, gradient = theirs.data, theirs.grad
                assert gradient is not None
                if index is None:
                    weights[name].step(weight.view(1, -1), gradient.view(1, -1), [0], step == 0)
                else:
                    chosen.setdefault(name, set()).add(tuple(index.tolist()))
                    weight, gradient = (weight, gradient) if axis == "rows" else (weight.t(), gradient.t())
                    weights[name].step(weight, gradient, index.tolist(), step % gap == 0)
                theirs.grad = None
                assert float((mine - theirs).abs().max()) < tolerance, (name, step)
    assert set(chosen) == {"a.weight", "b.weight"}
    assert rank >= 24 or all(len(rows) > 1 for rows in chosen.values()), "no refresh has chosen other rows"
    return model, optimizer

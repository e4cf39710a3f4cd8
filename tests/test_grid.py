"""Every way to step × accumulation × clipping × checkpointing × precision × axis, each cell against the eager oracle."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grass_compile
from grass_compile.runtime.gradient import CompactGrad
from grass_compile.runtime.moved import MovedGrad

from . import paper
from .forms import separated
from .harness import Oracle
from .pairs import every_pair

FEATURES, HIDDEN, OUT, TOKENS, RANK = 12, 16, 10, 6, 4
STEPS, GAP = 5, 3  # the first refresh, and one more
MAX_NORM = 0.05

KEYWORDS: dict[str, Any] = dict(lr=1e-2, eps=1e-3, weight_decay=0.1)
MODES = ("fused", "deferred", "adopted")
PRECISIONS = {"full": torch.float64, "autocast": torch.float32, "bf16": torch.bfloat16}


class Model(nn.Module):
    """Two linear layers whose weight gradients have rows and columns of norms far apart, and what stays dense."""

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.into, self.out = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, OUT, bias=False)
        self.checkpointing = checkpointing
        self.register_buffer("narrow", separated(FEATURES) ** 2)
        self.register_buffer("wide", separated(HIDDEN) ** 2)

    def block(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.gelu(self.into(x)) * self.wide)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) * self.narrow
        if self.checkpointing:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


@functools.lru_cache(maxsize=1)
def original(checkpointing: bool, precision: str, axis: str) -> nn.Module:
    """The model of some cells, one after the other; each trains a copy, and all copies share what is compiled."""
    torch._dynamo.reset()
    torch.manual_seed(16)  # one of those with which the rows that are chosen stand out
    return Model(checkpointing).to(PRECISIONS[precision])


@pytest.fixture(autouse=True)
def fresh() -> None:
    """In place of the fixture of this name for all tests, which would forget what is compiled."""


@pytest.fixture(autouse=True, scope="module")
def tidy() -> Iterator[None]:
    """Leave nothing compiled behind."""
    yield
    original.cache_clear()
    torch._dynamo.reset()


def batch(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)) * separated(OUT)
    return ((output.to(torch.float64) * direction).sum() + output.double().square().mean()) / TOKENS


def optimizer_for(mode: str, model: nn.Module, axis: str, clip: bool) -> torch.optim.Optimizer:
    if mode == "adopted":
        return torch.optim.AdamW(model.parameters(), **KEYWORDS)
    own: dict[str, Any] = {"max_grad_norm": MAX_NORM} if clip and mode == "fused" else {}
    own |= dict(rank=RANK, axis=axis, update_proj_gap=GAP, step_in_backward=mode == "fused")
    return paper.AdamW(model.named_parameters(), **own, **KEYWORDS)


def oracle_for(model: nn.Module, axis: str, mode: str, clip: bool) -> Oracle:
    names = ("into.weight", "out.weight")
    return Oracle(
        model.named_parameters(),
        projected=dict.fromkeys(names, (0 if axis == "rows" else 1, RANK)),
        update_proj_gap=GAP,
        max_grad_norm=MAX_NORM if clip else None,
        adopted=mode == "adopted",
        **KEYWORDS,
    )


def check_gradients(model: nn.Module, mode: str, waits: bool, step: int) -> None:
    """What a backward has left in ``.grad`` of the projected weights, and that it left the usual thing in the others."""
    for name, parameter in model.named_parameters():
        if name not in ("into.weight", "out.weight"):
            assert type(parameter.grad) is Tensor and parameter.grad.shape == parameter.shape
        elif mode == "adopted" and step == 0:
            assert type(parameter.grad) is Tensor
        elif mode == "fused" and not waits:
            assert isinstance(parameter.grad, MovedGrad) and parameter.grad.shape == parameter.shape
        else:
            assert isinstance(parameter.grad, CompactGrad) and parameter.grad.shape == parameter.shape
            assert RANK in parameter.grad.compact.shape


@every_pair(
    checkpointing=(False, True), precision=PRECISIONS, axis=("rows", "columns"), mode=MODES, accumulate=(1, 4), clip=(False, True)
)
def test_cell(checkpointing: bool, precision: str, axis: str, mode: str, accumulate: int, clip: bool) -> None:
    dtype = PRECISIONS[precision]
    model = copy.deepcopy(original(checkpointing, precision, axis))
    twin = copy.deepcopy(model)
    exact = twin if precision == "full" else copy.deepcopy(model).double()
    optimizer = optimizer_for(mode, model, axis, clip)
    project = {**paper.OPTIONS, "rank": RANK, "axis": axis, "update_proj_gap": GAP} if mode == "adopted" else {}
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", **project})
    eager = oracle_for(twin, axis, mode, clip)
    target = eager if precision == "full" else oracle_for(exact, axis, mode, clip)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "autocast")

    def own(step: int) -> None:
        for micro in range(accumulate):
            last = micro == accumulate - 1
            ours = isinstance(optimizer, grass_compile.AdamW)
            with optimizer.accumulate() if ours and not last else contextlib.nullcontext():  # type: ignore[attr-defined]
                with autocast():
                    loss = loss_of(compiled(batch(4 * step + micro, dtype))) / accumulate
                before = model.into.weight.detach().clone()
                loss.backward()
                check_gradients(model, mode, waits=accumulate > 1, step=step)
            moves = mode == "fused" and accumulate == 1
            assert torch.equal(model.into.weight, before) != moves
        if clip and mode == "adopted":
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        elif clip and mode == "deferred":
            norms.append(optimizer.clip_grad_norm_(MAX_NORM))  # type: ignore[attr-defined]
        optimizer.step()
        if clip and mode != "adopted":
            norms[step:] = [optimizer.grad_norm]  # type: ignore[attr-defined]
        optimizer.zero_grad()

    def theirs(model: nn.Module, oracle: Oracle, dtype: torch.dtype, step: int) -> None:
        for micro in range(accumulate):
            with autocast() if oracle is eager else contextlib.nullcontext():
                loss = loss_of(model(batch(4 * step + micro, PRECISIONS[precision]).to(dtype))) / accumulate
            loss.backward()
            oracle.choose()
        oracle.step()

    norms: list[Tensor] = []
    for step in range(STEPS):
        own(step)
        theirs(twin, eager, dtype, step)
        if target is not eager:
            theirs(exact, target, torch.float64, step)
        check_state(model, optimizer, eager, step)
        if clip:
            assert float(norms[step]) == pytest.approx(target.grad_norm, rel=1e-12 if precision == "full" else 0.02)
            assert step > 0 or target.grad_norm > MAX_NORM, "nothing was clipped"
    assert target.margin > 0.03, "the top rows are not far enough from the rest for what is compared here"
    compare(model, twin, exact, precision)


def check_state(model: nn.Module, optimizer: torch.optim.Optimizer, oracle: Oracle, step: int) -> None:
    """The rows that were chosen, and one update for each step."""
    for name in oracle.projected:
        state = optimizer.state[model.get_parameter(name)]
        assert state["index"].tolist() == oracle.state[name].index.tolist(), (step, name)
        assert state["updates"] == step + 1
        assert RANK in state["exp_avg"].shape


def compare(model: nn.Module, twin: nn.Module, exact: nn.Module, precision: str) -> None:
    """In fp64, equal to rounding; else as near to an fp64 run as twice the eager oracle's own error."""
    for (name, p), q, goal in zip(model.named_parameters(), twin.parameters(), exact.parameters(), strict=True):
        own, theirs = (float((tensor.detach().double() - goal.detach()).norm()) for tensor in (p, q))
        floor = 1e-12 if precision == "full" else torch.finfo(p.dtype).eps * float(goal.detach().norm())
        assert own <= 2 * theirs + floor, (name, own, theirs)

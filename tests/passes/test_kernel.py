"""The step of one weight as a graph of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache
from torch.utils._python_dispatch import TorchDispatchMode

import grass_compile
from grass_compile import ops
from grass_compile.config import SiteConfig
from grass_compile.math.layout import SHARED_HYPER
from grass_compile.optim.rules import AdamWRule
from grass_compile.passes.fx_utils import op_counts
from grass_compile.passes.kernel import WRITES, step_graphs

aten = torch.ops.aten


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_step_by_itself_writes_in_place(dim: int, weight_decay: float) -> None:
    """The weight first, then the state; nothing functional is left, and nothing of the weight's size but with decay."""
    config = SiteConfig(4, "rows", "reset", weight_decay != 0.0, 1.0, AdamWRule())
    compact, state = torch.zeros((4, 8) if dim == 0 else (6, 4)), torch.zeros((4, 8) if dim == 0 else (6, 4))
    hyper = torch.zeros(len(AdamWRule().hyper_names) + len(SHARED_HYPER))
    tensors = (compact, torch.zeros(6, 8), hyper, torch.arange(4), torch.zeros(1), state, state)
    (gm,) = step_graphs(config, dim, tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))
    counts = op_counts(gm)
    assert counts["grass_compile.row_update_.default"] == 1 and "grass_compile.row_update.default" not in counts
    assert counts["aten.copy_.default"] == 3 + (weight_decay != 0.0)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    whole = [node for node in calls if getattr(node.meta["val"], "shape", None) == (6, 8)]
    assert len(whole) == (2 if weight_decay else 0)  # the decayed weight, and its copy_
    update = next(i for i, node in enumerate(calls) if node.target is ops.row_update_)
    assert update < min(i for i, node in enumerate(calls) if node.target is aten.copy_.default and node.args[0].name != "input_1")


STEPS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ("AdamW", "AdamW8bit", "Adafactor", "Lion", "Muon", "SGD", "Sketchy")],
    ("AdamW", {"nonfinite": "propagate"}),
    ("AdamW", {"projection": "gaussian"}),
    ("AdamW", {"projection": "galore"}),
    ("Muon", {"stochastic_rounding": True}),
    ("AdamW", {"stochastic_rounding": True}),
]

GENERATED = ("AdamW", "AdamW8bit", "Adafactor", "Muon")
"""Compiled by Inductor too, which costs seconds each."""
SELDOM: list[tuple[str, dict[str, Any]]] = [
    *[("Muon", keywords) for keywords in ({}, {"stochastic_rounding": True})],
    *[(name, keywords) for name, keywords in STEPS if name == "AdamW" and keywords],
]
"""Of these, those that run with ``--exhaustive`` only."""


class Failing(TorchDispatchMode):
    """Raises at one of the operators that are run inside, but for those that write; generated code asks for memory instead."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten" and function not in WRITES:
            self.count()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def failing(compiler: str, at: int) -> Iterator[None]:
    """Inside, memory runs out at the ``at``-th operator that could need some, or request for some."""
    mode = Failing(at)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if compiler == "aot_eager":
            stack.enter_context(mode)
        for module in PyCodeCache.modules:
            if (allocate := getattr(module, "empty_strided_cpu", None)) is not None:
                patch.setattr(module, "empty_strided_cpu", lambda *args, allocate=allocate: (mode.count(), allocate(*args))[1])
        yield


@pytest.mark.parametrize(
    ("compiler", "name", "keywords"),
    [
        *[("aot_eager", *step) for step in STEPS],
        *[
            pytest.param("inductor", *step, marks=[pytest.mark.inductor, *[pytest.mark.exhaustive] * (step in SELDOM)])
            for step in STEPS
            if step[0] in GENERATED
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_a_step_that_runs_out_of_memory_has_written_nothing(compiler: str, name: str, keywords: dict[str, Any]) -> None:
    """Wherever it happens, the weight and its state are as before or as after; and once there is memory, nothing has been."""

    def train(fails: bool) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        """What was found after each failure in the third step, and what was there before it and after it."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if "stochastic_rounding" in keywords else torch.float32
        model = nn.Linear(32, 48, bias=False, dtype=dtype)
        optimizer = getattr(grass_compile, name)(
            model.named_parameters(), lr=0.01, rank=8, weight_decay=0.1, step_in_backward=False, **keywords
        )
        compiled = torch.compile(model, backend="grass", options={"compiler": compiler})

        def written() -> list[Tensor]:
            state = optimizer.state[model.weight].values()
            return [model.weight.detach().clone(), *[value.clone() for value in state if isinstance(value, Tensor)]]

        for _ in range(2):
            compiled(torch.randn(5, 32, dtype=dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        compiled(torch.randn(5, 32, dtype=dtype)).square().sum().backward()
        before, found = written(), []
        for number in itertools.count(1):
            try:
                with failing(compiler, number) if fails else contextlib.nullcontext():
                    optimizer.step()
                return found, before, written()
            except MemoryError:
                found.append(written())
        raise AssertionError

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))

    _, before, after = train(fails=False)
    found, _, end = train(fails=True)
    assert len(found) > 1 and same(found[0], before) and same(end, after)
    assert all(same(state, before) or same(state, after) for state in found)

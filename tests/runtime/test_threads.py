"""Threads that compile and train at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile.passes import fx_utils


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.linear.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


def trained(width: int, mode: bool | str, steps: int = 12) -> Tensor:
    model = Net(width)
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, seed=1, update_proj_gap=4, step_in_backward=mode)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        compiled(torch.randn(3, width, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.linear.weight.detach()


@pytest.mark.skipif(
    not hasattr(torch.compiler, "_compile_session_context"), reason="torch refuses compiled code while any thread traces"
)
def test_tracing_in_one_thread_leaves_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch knows of a trace by a global: two that overlap leave it wrong for good, and one refuses what others have compiled."""
    torch._dynamo.reset()
    fx_utils.trace.cache_clear()
    make_fx = fx_utils.make_fx

    def slow(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
        def traced(*tensors: Tensor) -> Any:
            time.sleep(0.05)  # others run meanwhile
            return function(*tensors)

        return make_fx(traced, **keywords)

    monkeypatch.setattr(fx_utils, "make_fx", slow)
    runs: list[tuple[int, bool | str]] = [(8, True), (8, False), (12, "auto"), (16, True)]  # two that share a graph
    found: dict[tuple[int, bool | str], Tensor] = {}

    def train(*run: Any) -> None:
        found[run] = trained(*run)

    threads = [threading.Thread(target=train, args=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.fx._symbolic_trace._is_fx_tracing_flag
    torch._dynamo.reset()
    assert len(found) == 4 and all(torch.equal(weight, trained(*run)) for run, weight in found.items())

"""Inductor's own estimate of peak memory: a regular step costs what frozen weights cost, plus the compact tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.estimate import estimated_peaks

from . import paper

TOKENS, WIDTH, RANK, LAYERS = 1024, 256, 32, 3


class Block(nn.Module):
    """A gated MLP with a norm and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def peaks(axis: str | None, backend: str, steps: int) -> dict[str, int]:
    """The estimates of the last variant that a training run compiles; ``axis=None`` freezes the linear weights."""
    torch._dynamo.reset()
    model = nn.Sequential(*[Block() for _ in range(LAYERS)])
    optimizer: Any = None
    if axis is None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(False)
    else:
        optimizer = paper.AdamW(model.named_parameters(), rank=RANK, axis=axis)
    compiled = torch.compile(model, backend=backend)
    with estimated_peaks() as found:
        for _ in range(steps):
            compiled(torch.randn(TOKENS, WIDTH)).square().mean().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
    return {peak.kind: peak.peak_bytes for peak in found}


@pytest.mark.inductor
@pytest.mark.slow
def test_columns_keep_the_floor() -> None:
    frozen, columns = peaks(None, "inductor", 1), peaks("columns", "grass", 2)
    per_layer = 3 * TOKENS * RANK  # what each of three weights keeps of its X
    compact = 4 * LAYERS * (per_layer + RANK * (2 * 2 * WIDTH + WIDTH))  # gathered activations and compact gradients
    assert columns["forward"] <= frozen["forward"] + compact
    assert columns["backward"] <= frozen["backward"] + compact


@pytest.mark.inductor
@pytest.mark.slow
def test_rows_need_no_full_gradient() -> None:
    frozen, rows = peaks(None, "inductor", 1), peaks("rows", "grass", 2)
    kept = 4 * LAYERS * TOKENS * (WIDTH + 2 * WIDTH)  # with rows, X itself is kept: the norm's output and down's input
    compact = 4 * LAYERS * RANK * (WIDTH + WIDTH + 2 * WIDTH)
    assert rows["backward"] <= frozen["backward"] + kept + compact

"""Finished graphs of both halves, and a way to train to get at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import grass_compile
from grass_compile.passes.fx_utils import outputs

from .. import forms, paper

aten = torch.ops.aten


def train(model: nn.Module, steps: int = 2, options: dict[str, Any] | None = None, **keywords: Any) -> grass_compile.AdamW:
    """A few steps through the compiled path, op by op."""
    optimizer = paper.AdamW(model.named_parameters(), **{"rank": forms.RANK, **keywords})
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", **(options or {})})
    for step in range(steps):
        forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _saved_bytes(forward: fx.GraphModule) -> int:
    values = [node.meta["val"] for node in outputs(forward) if isinstance(node, fx.Node)]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))

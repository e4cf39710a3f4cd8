"""The rewritten graphs: what is computed, what is saved for the backward, and what is written where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from grass_compile import ops
from grass_compile.passes.fx_utils import outputs

from .. import forms
from ..harness import products
from .graphs import train


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "LinearBias", "InOut", "Bmm", "EinsumHeads", "SplitWeight", "Twice"])
def test_no_full_product_on_a_regular_step(name: str, axis: str, graphs: list[Any]) -> None:
    model = forms.FORMS[name]()
    train(model, axis=axis)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    (_, refresh), (_, regular) = graphs
    assert products(refresh, shape) >= 1 or name == "SplitWeight"
    assert products(regular, shape) == 0
    part = 16 if name == "SplitWeight" else shape[0]  # along columns, each part has a product of its own
    assert products(regular, (forms.RANK, shape[1])) + products(regular, (part, forms.RANK)) >= 1


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_gather_is_tokens_by_rank(axis: str, graphs: list[Any]) -> None:
    train(forms.Linear(), axis=axis)
    forward, backward = graphs[1]
    gathers = [n for gm in (forward, backward) for n in gm.graph.nodes if n.target is ops.gather]
    assert [tuple(node.meta["val"].shape) for node in gathers] == [(forms.B * forms.S, forms.RANK)]


def test_columns_save_only_the_gathered_activation(graphs: list[Any]) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 48, bias=False), nn.Linear(48, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).cos_())

    saved = {}
    for axis in ("rows", "columns"):
        graphs.clear()
        torch._dynamo.reset()
        train(Deep(), axis=axis, rank=4)
        forward, _ = graphs[1]
        shapes = [tuple(v.meta["val"].shape) for v in outputs(forward)[1:] if isinstance(v, fx.Node)]
        saved[axis] = [shape for shape in shapes if forms.B * forms.S in shape or len(shape) == 3]
    tokens = forms.B * forms.S
    assert (4, tokens) in saved["columns"] and (tokens, 24) not in saved["columns"]  # it is saved as the view that is read
    size = {axis: sum(torch.Size(shape).numel() for shape in shapes) for axis, shapes in saved.items()}
    assert size["columns"] < size["rows"]


def test_without_rewrite_the_rows_come_from_the_full_gradient(graphs: list[Any]) -> None:
    torch.manual_seed(0)
    with_pass, without = forms.Linear(), forms.Linear()
    without.load_state_dict(with_pass.state_dict())
    train(with_pass, axis="rows", steps=4)
    graphs.clear()
    torch._dynamo.reset()
    train(without, axis="rows", steps=4, options={"disable_passes": ["rewrite"]})
    assert products(graphs[1][1], (forms.M, forms.N)) == 1
    torch.testing.assert_close(with_pass.w, without.w)

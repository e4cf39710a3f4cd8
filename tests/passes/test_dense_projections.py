"""Graphs of dense projections: no full gradient between refreshes, what is saved, and where a basis is made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

from grass_compile import ops
from grass_compile.config import SiteConfig
from grass_compile.math.layout import SHARED_HYPER
from grass_compile.optim.rules import AdamWRule
from grass_compile.passes.fx_utils import op_counts, outputs, placeholders
from grass_compile.passes.joint.rewrite import OF_SELECTOR
from grass_compile.passes.kernel import step_graphs

from .. import forms, paper
from ..harness import products
from ..pairs import every_pair
from .graphs import train

aten = torch.ops.aten

NAMES = ("Linear", "LinearBias", "InOut", "Bmm", "EinsumHeads", "SplitWeight", "Twice")
TOKENS = forms.B * forms.S


class Deep(nn.Module):
    """Two layers, of which no activation is of a basis' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 48, bias=False), nn.Linear(48, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).cos_())  # type: ignore[no-any-return]


def saved(forward: fx.GraphModule) -> list[tuple[int, ...]]:
    """Shapes of what a forward computes for the backward."""
    values = [value for value in outputs(forward)[1:] if isinstance(value, fx.Node) and value.op != "placeholder"]
    return [tuple(value.meta["val"].shape) for value in values]


@every_pair(name=NAMES, projection=["galore", "gaussian"], axis=["rows", "columns"])
def test_no_full_product_on_a_regular_step(name: str, projection: str, axis: str, graphs: list[Any]) -> None:
    model = forms.FORMS[name]()
    train(model, axis=axis, projection=projection, update_proj_gap=1 if projection == "gaussian" else 200)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    *refresh, (_, regular) = graphs
    assert len(refresh) == (projection == "galore"), "random vectors need no gradient, so a refresh is a regular step"
    assert products(regular, shape) == 0 and "grass_compile.refresh_.default" not in op_counts(regular)
    part = 16 if name == "SplitWeight" else shape[0]  # along columns, each part has a product of its own
    assert products(regular, (forms.RANK, shape[1])) + products(regular, (part, forms.RANK)) >= 1
    for _, backward in refresh:
        assert products(backward, shape) >= 1 or name == "SplitWeight"
        assert op_counts(backward)["grass_compile.refresh_.default"] == 1


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("projection", ["galore", "gaussian"])
def test_the_projected_operand_is_tokens_by_rank(projection: str, axis: str, graphs: list[Any]) -> None:
    train(forms.Linear(), axis=axis, projection=projection)
    forward, backward = graphs[-1]
    for gm, count in ((forward, axis == "columns"), (backward, axis == "rows")):
        assert products(gm, (TOKENS, forms.RANK)) == count and "grass_compile.gather.default" not in op_counts(gm)


@pytest.mark.parametrize("projection", ["galore", "gaussian"])
def test_columns_save_only_the_projected_activation(projection: str, graphs: list[Any]) -> None:
    train(Deep(), axis="columns", rank=4, projection=projection)
    forward, _ = graphs[-1]
    shapes = saved(forward)
    assert {(4, TOKENS), (TOKENS, 4)} & set(shapes) and (TOKENS, 24) not in shapes  # as it is, or as the view that is read
    assert not {(24, 4), (48, 4)} & set(shapes), "a basis is saved"


@pytest.mark.parametrize("projection", ["galore", "gaussian"])
def test_a_basis_for_the_backward_is_made_there(projection: str, graphs: list[Any]) -> None:
    """Under autocast, where that of ``galore`` has to be cast; and right before it is read, not all at once."""
    model = Deep()
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis="rows", projection=projection)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forms.loss_of(compiled(forms.batch(torch.float32, step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    forward, backward = graphs[-1]
    assert not {(48, 4), (32, 4)} & set(saved(forward))
    of_selector = [node for node in backward.graph.nodes if OF_SELECTOR in node.meta]
    made = [node for node in of_selector if not set(of_selector) & set(node.users)]
    assert [tuple(node.meta["val"].shape) for node in made] == [(32, 4), (48, 4)]
    for node in made:
        (reader,) = node.users
        assert node.next is reader and reader.target is aten.mm.default


@every_pair(name=NAMES, projection=["galore", "gaussian"], axis=["rows", "columns"])
def test_without_rewrite_the_numbers_are_the_same(name: str, projection: str, axis: str) -> None:
    model = forms.FORMS[name]().double()
    twin = copy.deepcopy(model)
    for each, disabled in ((model, ()), (twin, ("rewrite",))):
        keywords = dict(rank=forms.RANK, axis=axis, projection=projection, seed=1, eps=1e-3, lr=1e-2, update_proj_gap=2)
        optimizer = paper.AdamW(each.named_parameters(), **keywords)  # type: ignore[arg-type]
        options = {"compiler": "aot_eager", "disable_passes": disabled}
        compiled = torch.compile(each, backend="grass", options=options)
        for step in range(3):
            forms.loss_of(compiled(forms.batch(torch.float64, step))).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", ["galore", "gaussian"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_step_by_itself_writes_in_place(dim: int, projection: str) -> None:
    """One product that adds to the weight; nothing else of the weight's size."""
    config = SiteConfig(4, "rows", "reset", False, 1.0, AdamWRule(), projection=projection)  # type: ignore[arg-type]
    compact, state = torch.zeros((4, 9) if dim == 0 else (6, 4)), torch.zeros((4, 9) if dim == 0 else (6, 4))
    hyper = torch.zeros(len(AdamWRule().hyper_names) + len(SHARED_HYPER))
    selector = torch.zeros(9 if dim else 6, 4) if projection == "galore" else torch.zeros(2, dtype=torch.int64)
    tensors = (compact, torch.zeros(6, 9), hyper, selector, torch.zeros(1), state, state)
    (gm,) = step_graphs(config, dim, tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))
    counts = op_counts(gm)
    assert counts["grass_compile.rank_update_.default"] == 1 and "grass_compile.rank_update.default" not in counts
    assert counts["aten.copy_.default"] == 3
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert not [node for node in calls if getattr(node.meta["val"], "shape", None) == (6, 9)]
    (update,) = gm.graph.find_nodes(op="call_function", target=ops.rank_update_)
    assert update.args[0] is placeholders(gm)[1]

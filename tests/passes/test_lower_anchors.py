"""What becomes of an anchor in each backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from grass_compile.passes.fx_utils import op_counts, outputs

from .. import forms, paper
from ..harness import products
from .graphs import train


def test_slots_of_projected_weights_return_none(graphs: list[Any]) -> None:
    train(forms.LinearBias(), axis="rows")
    _, backward = graphs[1]
    assert [value is None for value in outputs(backward)][:2] == [True, False]


def test_op_counts(graphs: list[Any]) -> None:
    train(forms.Linear(), axis="rows")
    refresh, regular = (op_counts(backward) for _, backward in graphs)
    for counts in (refresh, regular):
        assert counts["grass_compile.step_.default"] == 1 and "grass_compile.anchor.default" not in counts
        assert not {"aten.sqrt.default", "aten.copy_.default"} & set(counts), "the rule is compiled by itself"
    assert refresh["grass_compile.refresh_.default"] == 1 and "grass_compile.gather.default" not in refresh
    assert regular["grass_compile.gather.default"] == 1 and "grass_compile.refresh_.default" not in regular


aten = torch.ops.aten


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_deferred_backward_returns_the_compact_gradient(axis: str, accumulate: int, graphs: list[Any]) -> None:
    """Of a refresh, the first backward chooses rows, which writes index and moments; every other writes nothing at all."""
    optimizer = paper.AdamW((model := forms.Linear()).named_parameters(), rank=4, axis=axis, step_in_backward=False)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(2):
        for _ in range(accumulate):
            forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    kinds = ["choose", "keep of a refresh", "keep"] if accumulate > 1 else ["choose", "keep"]
    assert len(graphs) == len(kinds)
    shape = (4, forms.N) if axis == "rows" else (forms.M, 4)
    for kind, (forward, backward) in zip(kinds, graphs, strict=True):
        counts = op_counts(backward)
        assert counts.get("grass_compile.refresh_.default", 0) == (kind == "choose")
        gathers = counts.get("grass_compile.gather.default", 0) + op_counts(forward).get("grass_compile.gather.default", 0)
        assert gathers == (kind == "keep") and products(backward, (forms.M, forms.N)) == (kind != "keep")
        assert "grass_compile.step_.default" not in counts
        compact = [value for value in outputs(backward) if isinstance(value, fx.Node)]
        assert [tuple(value.meta["val"].shape) for value in compact] == [shape]

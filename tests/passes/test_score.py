"""Scores beside compact products: no full product, and nothing saved where nothing is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from grass_compile.passes.fx_utils import op_counts

from .. import forms
from ..harness import products
from .graphs import _saved_bytes, train


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "InOut", "Bmm", "FusedQKV", "SplitWeight", "Twice"])
def test_no_full_product_where_scores_are_sampled(name: str, axis: str, graphs: list[Any]) -> None:
    """Neither on a refresh nor on a regular step; and a regular step saves nothing for the scores."""
    model = forms.FORMS[name]()
    train(model, axis=axis, scores="sampled")
    train(forms.FORMS[name](), axis=axis)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    choosing, regular, _, plain = graphs
    assert products(choosing[1], shape) == products(regular[1], shape) == 0
    assert "grass_compile.propose_.default" in op_counts(choosing[1])
    assert not any("energy" in name or "sample" in name or "propose" in name for gm in regular for name in op_counts(gm))
    assert _saved_bytes(regular[0]) == _saved_bytes(plain[0]) + 8 * forms.RANK  # where the next rows are put: no activation


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "InOut", "Bmm", "FusedQKV", "SplitWeight", "Twice"])
def test_one_graph_where_scores_are_estimated(name: str, axis: str, graphs: list[Any]) -> None:
    """A refresh is no other graph than a regular step, without a full product, and keeps no activation for the scores."""
    model = forms.FORMS[name]()
    train(model, steps=4, axis=axis, scores="estimate", update_proj_gap=3)
    train(forms.FORMS[name](), axis=axis)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    both, _, plain = graphs
    assert products(both[1], shape) == 0
    assert "grass_compile.propose_.default" in op_counts(both[1])
    energies = op_counts(both[0]).get("grass_compile.energy.default", 0)
    assert (energies > 0) == (axis == "columns")
    extra = _saved_bytes(both[0]) - _saved_bytes(plain[0]) - 8 * forms.RANK - 1  # where the next rows are put, and whether
    assert extra == 0 if axis == "rows" else 0 < extra <= 4 * energies * max(shape)

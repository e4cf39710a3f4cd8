"""On a refresh the gathers are taken out of both halves again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grass_compile import ops
from grass_compile.passes import pipeline
from grass_compile.passes.backward.restore_full_grad import restore_full_grad
from grass_compile.passes.context import PassContext
from grass_compile.passes.fx_utils import copy, op_counts

from .. import forms
from ..harness import products
from .graphs import train

aten = torch.ops.aten


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Each unfinished backward and its plan."""
    found: list[tuple[Any, Any]] = []
    finish = pipeline.finish_backward

    def watched(gm: Any, plan: Any, key: Any, saved: Any) -> Any:
        found.append((gm, plan))
        return finish(gm, plan, key, saved)

    monkeypatch.setattr(pipeline, "finish_backward", watched)
    return found


@pytest.mark.parametrize("name", ["Linear", "InOut", "FusedQKV", "Slices", "HeadsInnermost", "ScaledRows"])
def test_full_product_is_back(name: str, halves: list[Any]) -> None:
    model = forms.FORMS[name]()
    train(model, steps=1, axis="rows")
    gm, plan = halves[0]
    regular = copy(gm)
    assert restore_full_grad(regular, PassContext(plan=plan, refresh=(False,))) == 0
    assert op_counts(regular) == op_counts(gm)
    restored = copy(gm)
    assert restore_full_grad(restored, PassContext(plan=plan, refresh=(True,))) >= 1
    assert not restored.graph.find_nodes(op="call_function", target=ops.gather)
    (anchor,) = restored.graph.find_nodes(op="call_function", target=torch.ops.grass_compile.anchor.default)
    assert tuple(anchor.args[0].meta["val"].shape) == tuple(model.w.shape)


def test_values_follow_what_the_forward_saves(halves: list[Any]) -> None:
    """With columns the forward of a refresh saves all of X, and the backward learns that from ``saved``."""
    train(forms.Linear(), steps=1, axis="columns")
    gm, plan = halves[0]
    restored = copy(gm)
    (saved,) = [node for node in restored.graph.find_nodes(op="placeholder") if tuple(node.meta["val"].shape) == (15, forms.RANK)]
    whole = saved.meta["val"].new_empty(15, forms.N)
    restore_full_grad(restored, PassContext(plan=plan, refresh=(True,), saved={saved.name: whole}))
    assert products(restored, (forms.M, forms.N)) == 1 and products(gm, (forms.M, forms.RANK)) == 1


def test_sampled_scores_form_no_full_gradient(halves: list[Any]) -> None:
    train(forms.Linear(), steps=1, axis="rows", scores="sampled")
    gm, plan = halves[0]
    assert restore_full_grad(copy(gm), PassContext(plan=plan, refresh=(True,))) == 0

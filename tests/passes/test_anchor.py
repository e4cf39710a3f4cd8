"""One operator in the slot of each weight's leaf, and none in that of the weight."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

from grass_compile import ops
from grass_compile.passes import pipeline
from grass_compile.passes.context import PassContext
from grass_compile.passes.fx_utils import outputs
from grass_compile.passes.joint.anchor import anchors

from .. import forms
from .graphs import train


@pytest.fixture
def anchored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, PassContext]]:
    """Each joint graph as `anchor` leaves it, and its context."""
    found: list[tuple[fx.GraphModule, PassContext]] = []

    def watch(gm: fx.GraphModule, context: PassContext) -> int:
        found.append((gm, context))
        return 0

    monkeypatch.setattr(pipeline, "JOINT", (*pipeline.JOINT, watch))
    return found


@pytest.mark.parametrize("name", ["Linear", "LinearBias", "JoinedWeights"])
def test_anchor_takes_the_slot_of_the_leaf(name: str, anchored: list[Any]) -> None:
    train(forms.FORMS[name](), steps=1, axis="rows")
    ((gm, context),) = anchored
    made, values = anchors(gm), outputs(gm)
    assert len(made) == len(context.plan.projections) and [node.args[-1] for node in made] == list(range(len(made)))
    for node, projection in zip(made, context.plan.projections, strict=True):
        assert values[context.interface.slots[projection.position]] is None
        leaf = context.inputs[projection.position]["leaf"]
        position = next(at for at, found in context.nodes.items() if found is leaf)
        assert values[context.interface.slots[position]] is node
        assert node.meta["partitioner_tag"] == "must_be_in_backward"
        assert tuple(node.meta["val"].shape) == tuple(leaf.meta["val"].shape)


def test_norm_is_of_all_gradients(anchored: list[Any]) -> None:
    train(forms.LinearBias(), steps=1, axis="rows", max_grad_norm=1.0, step_in_backward=True)
    ((gm, _),) = anchored
    (norm,) = gm.graph.find_nodes(op="call_function", target=ops.norm)
    compact, dense = norm.args
    assert list(compact) == anchors(gm) and [tuple(node.meta["val"].shape) for node in dense] == [(forms.M,)]

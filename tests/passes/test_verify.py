"""What a finished backward may not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from grass_compile import ops
from grass_compile.errors import GraphError
from grass_compile.passes import pipeline
from grass_compile.passes.backward.schedule_steps import steps, written
from grass_compile.passes.backward.verify import verify
from grass_compile.passes.fx_utils import op_counts

from .. import forms
from ..harness import moving
from .graphs import train

aten = torch.ops.aten


def test_verify_sees_a_read_after_the_write(graphs: list[Any]) -> None:
    """Of the weight, be it through a view, and of the moments."""
    train(forms.Linear(), axis="rows")
    _, backward = graphs[1]
    (step,) = steps(backward)
    verify(backward, moving("w"))
    for node in written(step):
        with backward.graph.inserting_before(next(iter(backward.graph.find_nodes(op="output")))):
            view = backward.graph.call_function(aten.permute.default, (node, [1, 0]))
            reader = backward.graph.call_function(aten.sum.default, (view,))
        with pytest.raises(GraphError, match=rf"w: (permute|sum).* uses {node.name} after its step has written it"):
            verify(backward, moving("w"))
        backward.graph.erase_node(reader)
        backward.graph.erase_node(view)


def test_verify_wants_exactly_one_step(graphs: list[Any]) -> None:
    train(forms.Linear(), axis="rows")
    _, backward = graphs[1]
    (step,) = steps(backward)
    with backward.graph.inserting_after(step):
        backward.graph.node_copy(step)
    with pytest.raises(GraphError, match="w: 2 steps in one backward graph"):
        verify(backward, moving("w"))
    for node in steps(backward):
        backward.graph.erase_node(node)
    with pytest.raises(GraphError, match="w: 0 steps in one backward graph"):
        verify(backward, moving("w"))


def test_verify_sees_a_read_before_the_refresh(graphs: list[Any]) -> None:
    """Of the index and of the moments, which a refresh writes."""
    train(forms.Linear(), axis="rows")
    backward, _ = (backward for _, backward in graphs)
    (refresh,) = backward.graph.find_nodes(op="call_function", target=ops.refresh_)
    verify(backward, moving("w"))
    for node in refresh.all_input_nodes[1:]:
        with backward.graph.inserting_before(refresh):
            early = backward.graph.call_function(aten.neg.default, (node,))
        with pytest.raises(GraphError, match=f"{node.name}: {early.name} reads it before the refresh has written it"):
            verify(backward, moving("w"))
        backward.graph.erase_node(early)


def test_verify_sees_an_anchor_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished: list[fx.GraphModule] = []
    finish = pipeline.finish_backward

    def watched(gm: fx.GraphModule, *how: Any) -> fx.GraphModule:
        unfinished.append(gm)
        return finish(gm, *how)

    monkeypatch.setattr(pipeline, "finish_backward", watched)
    train(forms.Linear(), axis="rows")
    for gm in unfinished:
        assert op_counts(gm)["grass_compile.anchor.default"] == 1
        with pytest.raises(GraphError, match="an anchor is left"):
            verify(gm, moving())

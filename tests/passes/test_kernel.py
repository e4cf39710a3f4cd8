"""The step of one weight as a graph of its own."""

from __future__ import annotations

import pytest
import torch

from grass_compile import ops
from grass_compile.config import SiteConfig
from grass_compile.math.layout import SHARED_HYPER
from grass_compile.optim.rules import AdamWRule
from grass_compile.passes.fx_utils import op_counts
from grass_compile.passes.kernel import step_graph

aten = torch.ops.aten


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_step_by_itself_writes_in_place(dim: int, weight_decay: float) -> None:
    """The weight first, then the state; nothing functional is left, and nothing of the weight's size but with decay."""
    config = SiteConfig(4, "rows", "reset", weight_decay != 0.0, 1.0, AdamWRule())
    compact, state = torch.zeros((4, 8) if dim == 0 else (6, 4)), torch.zeros((4, 8) if dim == 0 else (6, 4))
    hyper = torch.zeros(len(AdamWRule().hyper_names) + len(SHARED_HYPER))
    tensors = (compact, torch.zeros(6, 8), hyper, torch.arange(4), torch.zeros(1), state, state)
    gm = step_graph(config, dim, tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))
    counts = op_counts(gm)
    assert counts["grass_compile.row_update_.default"] == 1 and "grass_compile.row_update.default" not in counts
    assert counts["aten.copy_.default"] == 3 + (weight_decay != 0.0)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    whole = [node for node in calls if getattr(node.meta["val"], "shape", None) == (6, 8)]
    assert len(whole) == (2 if weight_decay else 0)  # the decayed weight, and its copy_
    update = next(i for i, node in enumerate(calls) if node.target is ops.row_update_)
    assert update < min(i for i, node in enumerate(calls) if node.target is aten.copy_.default and node.args[0].name != "input_1")

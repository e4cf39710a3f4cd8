"""Average gradients over the ranks of a group, where their weights are the same on each.

Before::

    mm:     f32[r, n]
    anchor: f32[r, n] = grass_compile.anchor(mm, weight, hyper, ...)

After::

    mm:          f32[r, n]
    div:         f32[r, n] = div(mm, size)
    all_reduce:  f32[r, n] = _c10d_functional.all_reduce(div, "sum", group)
    wait_tensor: f32[r, n] = _c10d_functional.wait_tensor(all_reduce)
    anchor:      f32[r, n] = grass_compile.anchor(wait_tensor, weight, hyper, ...)

Contract: what a refresh chooses by is averaged even where gradients are not (``no_sync()``), since all ranks have to choose the
same. Nothing that the forward saves changes, since the halves are apart already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...distributed.layout import averages
from ..context import PassContext
from ..fx_utils import call, provenance
from ..joint.anchor import anchors

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def reduce(gm: fx.GraphModule, context: PassContext) -> int:
    """Average gradients, in place.

    Args:
        gm: a backward graph with anchors.
        context: says which weights are spread over ranks, and whether this backward averages.

    Returns:
        How many gradients are averaged.
    """
    plan, count = context.planned, 0
    for node in anchors(gm):
        arguments: Any = node.args
        gradient, number = arguments[0], arguments[-1]
        projection, action = plan.projections[number], context.actions[number]
        layout = projection.config.layout
        if layout is None or not averages(action, projection.position in context.full, context.syncs):
            continue
        with provenance(gm, "reduce", projection.name, node), gm.graph.inserting_before(node):
            share = call(gm.graph, aten.div.Tensor, gradient, layout.size)
            sent = call(gm.graph, c10d.all_reduce.default, share, "sum", layout.group)
            node.update_arg(0, call(gm.graph, c10d.wait_tensor.default, sent))
        count += 1
    return count

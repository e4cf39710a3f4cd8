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

A weight of which each rank owns a part (FSDP2) gets its part of the mean: a ``reduce_scatter_tensor`` takes the place of
``all_reduce``, around it what makes the parts equal in length and contiguous. With replicas of each part (HSDP) an ``all_reduce``
over these follows. Where new rows are chosen by the whole gradient, that is averaged on all ranks, and `lower_anchors` cuts the
part out of what was chosen (`own_part`).

Contract: what a refresh chooses by is averaged even where gradients are not (``no_sync()``), since all ranks have to choose the
same. Nothing that the forward saves changes, since the halves are apart already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...distributed.layout import Layout, MeshDim, averages
from ..context import PassContext
from ..fx_utils import call, provenance, shape_of
from ..joint.anchor import anchors

aten = torch.ops.aten
prims = torch.ops.prims
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
        layout, full = projection.config.layout, projection.position in context.full
        if layout is None or not _is_reduced(layout, action, full, context.syncs):
            continue
        with provenance(gm, "reduce", projection.name, node), gm.graph.inserting_before(node):
            share = gradient
            if layout.reduce_dtype is not None and gradient.meta["val"].dtype != layout.reduce_dtype:
                share = call(gm.graph, prims.convert_element_type.default, gradient, layout.reduce_dtype)
            share = call(gm.graph, aten.div.Tensor, share, layout.size)
            scatters = not full and layout.shard is not None
            mean = _scattered(gm.graph, share, layout) if scatters else share
            for dim in layout.mesh:
                if not (scatters and dim.shards is not None):
                    mean = _summed(gm.graph, mean, dim)
            if scatters and projection.config.checked:
                mean = _not_finite_anywhere(gm.graph, mean, layout)
            node.update_arg(0, mean)
        count += 1
    return count


def _is_reduced(layout: Layout, action: str, full: bool, syncs: bool) -> bool:
    if layout.shard is not None:  # the leaf has the shape of the part
        return action != "skip"
    return averages(action, full, syncs)


def _summed(graph: fx.Graph, value: fx.Node, dim: MeshDim) -> fx.Node:
    return call(graph, c10d.wait_tensor.default, call(graph, c10d.all_reduce.default, value, "sum", dim.group))


def _scattered(graph: fx.Graph, value: fx.Node, layout: Layout) -> fx.Node:
    """The sum over the ranks of the part that this rank owns of a compact gradient."""
    shard = layout.shard
    assert shard is not None and shard.shards is not None and layout.shape is not None
    along, length = shard.shards, layout.shape[shard.shards]
    if along:
        value = call(graph, aten.permute.default, value, [1, 0])
    if missing := layout.padded * shard.size - shape_of(value)[0]:
        value = call(graph, aten.constant_pad_nd.default, value, [0, 0, 0, missing])
    elif not value.meta["val"].is_contiguous():
        value = call(graph, aten.clone.default, value, memory_format=torch.contiguous_format)
    sent = call(graph, c10d.reduce_scatter_tensor.default, value, "sum", shard.size, shard.group)
    part = call(graph, c10d.wait_tensor.default, sent)
    if length != layout.padded:
        part = call(graph, aten.slice.Tensor, part, 0, 0, length)
    return call(graph, aten.permute.default, part, [1, 0]) if along else part


def _not_finite_anywhere(graph: fx.Graph, part: fx.Node, layout: Layout) -> fx.Node:
    """Not finite if the part of any rank is not, so that all of them skip the same steps."""
    assert layout.shard is not None
    squares = call(graph, aten.mul.Tensor, part, part)
    flag = call(graph, aten.mul.Tensor, call(graph, aten.sum.default, squares), 0.0)
    return call(graph, aten.add.Tensor, part, _summed(graph, flag, layout.shard))


def own_part(graph: fx.Graph, compact: fx.Node, layout: Layout | None) -> fx.Node:
    """The part that this rank owns of a compact gradient which all ranks have."""
    if layout is None or layout.shape is None or layout.sharded_dim is None:
        return compact
    dim = layout.sharded_dim
    return call(graph, aten.slice.Tensor, compact, dim, layout.start, layout.start + layout.shape[dim])

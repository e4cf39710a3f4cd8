"""Turn new values into writes and give every node of ours its place in the backward graph.

Before::

    row_update: f32[m, n] = grass_compile.row_update(weight, 0, idx, update)       <- and a list of what to write
    ...
    return (None, None, ..., grad_bias)

After::

    row_update_:           grass_compile.row_update_(weight, 0, idx, update)      <- after the last reader of weight
    copy_:      f32[r, n] = copy_(exp_avg, exp_avg_new)
    ...
    return (None, None, ..., grad_bias)

The state of a weight is written after the weight: Inductor computes what reads a tensor before it lowers a write to it, so in
the other order the update would be stored to memory first, and moments and weight would take two kernels instead of one.

Contract: a write stands after every other reader of the tensor that it writes (be it through a view), and otherwise as
early as its inputs allow, so that a layer's compact step can run (and ``dY``, ``X`` and ``G`` be freed) as soon as its
gradient exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..runtime import ops
from .fuse import Write
from .fx_utils import PROVENANCE, call, output_node, placeholders, provenance, readers

aten = torch.ops.aten


def place(gm: fx.GraphModule, writes: Sequence[Write]) -> None:
    """Finish a graph in place.

    Args:
        gm: a backward graph, or a step by itself.
        writes: the inputs that get a new value.
    """
    for write in writes:
        with provenance(gm, "place", write.weight, write.value):
            _write(gm, write.target, write.value)
    gm.graph.eliminate_dead_code()
    _hoist(gm)
    gm.recompile()


def _write(gm: fx.GraphModule, target: fx.Node, value: fx.Node) -> None:
    """Insert the write of ``value`` into ``target`` at the end of the graph; `_hoist` moves it up later."""
    with gm.graph.inserting_before(output_node(gm)):
        if value.target is ops.row_update:
            base, *rest = value.args
            if base is not target:  # weight decay: the whole weight first
                call(gm.graph, aten.copy_.default, target, base)
            call(gm.graph, ops.row_update_, target, *rest)
        else:
            call(gm.graph, aten.copy_.default, target, value)


def is_write(node: fx.Node) -> bool:
    """Whether a node writes its first argument."""
    return node.target in (aten.copy_.default, ops.row_update_)


def refreshes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that choose new rows; they write every input but the first."""
    return list(gm.graph.find_nodes(op="call_function", target=ops.refresh_))


def _hoist(gm: fx.GraphModule) -> None:
    """Move every node of ours up to just behind the last node that it has to follow.

    Nodes that were moved count as standing at their anchor, the node that was not moved and that they stand behind; a node
    is put behind the last one with the same anchor, so ties keep the topological order in which the walk visits them.
    """
    inputs = placeholders(gm)
    reading = {node: [user for user in readers(node) if not is_write(user) and user.op != "output"] for node in inputs}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    anchors: dict[fx.Node, fx.Node] = dict.fromkeys(inputs, inputs[-1])
    last: dict[fx.Node, fx.Node] = {}
    refreshed = {source: node for node in refreshes(gm) for source in node.all_input_nodes[1:]}  # read them after that
    writes: dict[Any, fx.Node] = {}  # the last write to a tensor, and the row update of a weight by its provenance
    for node in list(gm.graph.nodes):
        if PROVENANCE not in node.meta or node.op != "call_function":
            continue
        before = list(node.all_input_nodes) or inputs[-1:]
        before += [refreshed[source] for source in before if source in refreshed and refreshed[source] is not node]
        if is_write(node):
            target = before[0]
            before += reading[target] + [writes[key] for key in (target, node.meta[PROVENANCE]) if key in writes]
            writes[target] = node
            if node.target is ops.row_update_:
                writes[node.meta[PROVENANCE]] = node
        anchor = max((anchors.get(source, source) for source in before), key=lambda source: order[source])
        last.get(anchor, anchor).append(node)
        anchors[node], last[anchor] = anchor, node

"""Put one operator in the joint graph for whatever the backward will do with each weight gradient.

Before (one weight of rank r along its rows)::

    mm: f32[r, n]                                              <- made by `rewrite`
    return (loss, ..., grad_weight, None, None, None, ...)     <- one slot per primal

After::

    anchor: f32[r, n] = grass_compile.anchor(mm, weight, hyper, [idx, exp_avg, exp_avg_sq], None, [r, n], 0)
    return (loss, ..., None, None, None, anchor, ...)          <- in the slot of the weight's *leaf*

The leaf is an input of the compact gradient's shape, without storage, that no forward reads. What the backward returns for it,
autograd hands on as it does any gradient. The graph stays functional, every tensor that may have to be written reaches the
backward, and one partition serves every action: `lower_anchors` replaces the anchor in a copy of the backward for each.
"""

from __future__ import annotations

import torch
from torch import fx

from ... import ops
from ...math.layout import graph_state
from ..context import PassContext
from ..fx_utils import call, output_node, outputs, provenance, set_outputs, shape_of


def anchor(gm: fx.GraphModule, context: PassContext) -> int:
    """Insert the anchors, in place.

    Args:
        gm: the joint graph.
        context: has the sites, in the order of the plan's projections, their compact gradients and what new rows are proposed by.

    Returns:
        How many anchors were inserted.
    """
    plan, inputs, nodes, found = context.planned, context.inputs, context.nodes, context.findings
    assert context.interface is not None
    slots = {nodes[position]: slot for position, slot in context.interface.slots.items()}
    values, made = outputs(gm), []
    for number, site in enumerate(found.sites):
        position = site.weight.position
        named = inputs[position]
        gradient = found.compact[position]
        state = [named[name] for name in graph_state(site.weight.config)]
        shape = list(shape_of(named["leaf"]))
        with provenance(gm, "anchor", site.weight.name, site.slot), gm.graph.inserting_before(output_node(gm)):
            node = call(
                gm.graph, ops.anchor, gradient, named["weight"], named["hyper"], state, found.energy.get(position), shape, number
            )
        node.meta["partitioner_tag"] = "must_be_in_backward"
        values[slots[named["read"]]], values[slots[named["leaf"]]] = None, node
        made.append(node)
    if plan.clipped is not None:
        dense = [values[slots[nodes[position]]] for position in plan.clipped if position in nodes]
        dense = [value for value in dense if isinstance(value, fx.Node)]
        with provenance(gm, "anchor", "norm", made[0]), gm.graph.inserting_before(output_node(gm)):
            norm = call(gm.graph, ops.norm, made, dense)
        norm.meta["partitioner_tag"] = "must_be_in_backward"
        values[slots[nodes[max(nodes)]]] = norm
    set_outputs(gm, values)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return len(made)


def anchors(gm: fx.GraphModule) -> list[fx.Node]:
    """The anchors of a graph."""
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.grass_compile.anchor.default))

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

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ... import ops
from ...math.layout import graph_state
from ..fx_utils import call, output_node, outputs, provenance, set_outputs, shape_of
from ..records import Site


def anchor(
    gm: fx.GraphModule,
    *,
    sites: tuple[Site, ...],
    compact: Mapping[int, fx.Node],
    energy: Mapping[int, fx.Node],
    inputs: Mapping[int, Mapping[str, fx.Node]],
    slots: Mapping[fx.Node, int],
    clipped: Sequence[fx.Node] = (),
    norm_leaf: fx.Node | None = None,
) -> None:
    """Insert the anchors, in place.

    Args:
        gm: the joint graph.
        sites: in the order of the plan's projections.
        compact: compact gradients by weight position.
        energy: what new rows are proposed by, for the weights where they are.
        inputs: for each weight position, the placeholders ``weight``, ``hyper``, ``leaf`` and those of its state.
        slots: for each primal, the position of its gradient slot among all outputs.
        clipped: dense parameters whose gradients are clipped along with the compact ones.
        norm_leaf: the input in whose slot the common norm is returned; None if nothing is clipped in the graph.
    """
    values, made = outputs(gm), []
    for number, site in enumerate(sites):
        position = site.weight.position
        named = inputs[position]
        gradient = compact[position]
        state = [named[name] for name in graph_state(site.weight.config)]
        shape = list(shape_of(named["leaf"]))
        with provenance(gm, "anchor", site.weight.name, site.slot), gm.graph.inserting_before(output_node(gm)):
            node = call(
                gm.graph, ops.anchor, gradient, named["weight"], named["hyper"], state, energy.get(position), shape, number
            )
        node.meta["partitioner_tag"] = "must_be_in_backward"
        values[slots[named["weight"]]], values[slots[named["leaf"]]] = None, node
        made.append(node)
    if norm_leaf is not None:
        dense = [values[slots[primal]] for primal in clipped]
        dense = [value for value in dense if isinstance(value, fx.Node)]
        with provenance(gm, "anchor", "norm", made[0]), gm.graph.inserting_before(output_node(gm)):
            norm = call(gm.graph, ops.norm, made, dense)
        norm.meta["partitioner_tag"] = "must_be_in_backward"
        values[slots[norm_leaf]] = norm
    set_outputs(gm, values)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def anchors(gm: fx.GraphModule) -> list[fx.Node]:
    """The anchors of a graph."""
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.grass_compile.anchor.default))

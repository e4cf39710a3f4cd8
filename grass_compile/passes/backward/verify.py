"""Check a finished backward graph: what a silent wrong number would need, cannot be there.

Contract: pure analysis.

Raises:
    GraphError: a rule is broken; the message names the weight and the node.
"""

from __future__ import annotations

from torch import fx

from ... import ops
from ...errors import GraphError
from ..context import PassContext
from ..fx_utils import PROVENANCE, readers
from .schedule_steps import refreshes, steps, written


def verify(gm: fx.GraphModule, context: PassContext) -> int:
    """Check the writes of a backward graph.

    Each projected weight that has to move gets exactly one step; nothing reads a tensor after its step has written it, or
    before its refresh has.

    Args:
        gm: the backward graph after `schedule_steps`.
        context: says which weights have to move.

    Returns:
        0, since the graph stays as it is.
    """
    pairs = zip(context.planned.projections, context.actions, strict=True)
    names = [projection.name for projection, action in pairs if action == "step"]
    if gm.graph.find_nodes(op="call_function", target=ops.anchor):
        raise GraphError("an anchor is left in the backward graph; please report this.")
    found = {node: str(node.meta.get(PROVENANCE, ("", "a weight"))[1]) for node in steps(gm)}
    for name in names:
        if (count := list(found.values()).count(name)) != names.count(name):
            raise GraphError(f"{name}: {count} steps in one backward graph, not one; please report this.")
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    for step, name in found.items():
        for node in written(step):
            if late := [user for user in readers(node) if order[user] > order[step]]:
                raise GraphError(f"{name}: {late[0].name} uses {node.name} after its step has written it.")
    for refresh in refreshes(gm):
        for node in written(refresh):
            if early := [user for user in readers(node) if order[user] < order[refresh]]:
                raise GraphError(f"{node.name}: {early[0].name} reads it before the refresh has written it.")
    return 0

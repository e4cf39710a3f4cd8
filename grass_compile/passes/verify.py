"""Check a finished backward graph: what a silent wrong number would need, cannot be there.

Contract: pure analysis.

Raises:
    GraphError: a rule is broken; the message names the weight and the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ..errors import GraphError
from ..runtime import ops
from .fx_utils import placeholders, readers
from .place import is_write, refreshes

aten = torch.ops.aten


def verify(gm: fx.GraphModule, *, weights: Mapping[str, str], names: Sequence[str]) -> None:
    """Check the writes of a backward graph.

    Each projected weight gets exactly one row update; nothing reads a tensor after it was written (apart from the next write
    to it); nothing functional is left of the update.

    Args:
        gm: the backward graph after `place`.
        weights: the qualified name of each weight that moves by the name of its placeholder.
        names: the qualified names of the weights that have to move.
    """
    if missing := [name for name in names if name not in weights.values()]:
        raise GraphError(f"{missing[0]}: nothing updates it in the backward graph; please report this.")
    if gm.graph.find_nodes(op="call_function", target=ops.anchor):
        raise GraphError("an anchor is left in the backward graph; please report this.")
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    for node in placeholders(gm):
        writes = [user for user in node.users if is_write(user) and user.args[0] is node]
        if node.name in weights:
            updates = [write for write in writes if write.target is ops.row_update_]
            if len(updates) != 1:
                raise GraphError(f"{weights[node.name]}: {len(updates)} row updates in one backward graph, not one.")
        if not writes:
            continue
        first = min(order[write] for write in writes)
        for user in readers(node):
            if user not in writes and order[user] > first:
                raise GraphError(f"{weights.get(node.name, node.name)}: {user.name} reads it after it was written.")
    for refresh in refreshes(gm):
        for node in refresh.all_input_nodes[1:]:
            if early := [user for user in readers(node) if order[user] < order[refresh]]:
                raise GraphError(f"{node.name}: {early[0].name} reads it before the refresh has written it.")
    if gm.graph.find_nodes(op="call_function", target=ops.row_update):
        raise GraphError("a functional row update is left in the backward graph, which would copy the whole weight.")

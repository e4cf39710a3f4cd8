"""Form the full gradients of weights that choose new rows: take out again what `rewrite` has put in.

Rows (out-features), before::

    gather:  f32[b, r] = grass_compile.gather([grad_out], [idx])
    permute: f32[r, b] = permute(gather, [1, 0])
    mm:      f32[r, n] = mm(permute, x)

After::

    permute: f32[m, b] = permute(grad_out, [1, 0])
    mm:      f32[m, n] = mm(permute, x)

Runs on copies of both halves. Of columns, the gather stands in the forward; the output that held the gathered activations holds
all of ``x`` then, and the backward is told so by ``saved``.

Contract: changes nothing for weights that keep their rows; every fake value behind a change is computed anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ... import ops
from ..context import PassContext
from ..fx_utils import call, placeholders, propagate, shape_of
from ..joint.rewrite import SELECTION

aten = torch.ops.aten


def restore_full_grad(gm: fx.GraphModule, context: PassContext) -> int:
    """Form the full gradients of some weights again, in place.

    Args:
        gm: a copy of a forward or of a backward graph.
        context: says whose, and what the forward saves.

    Returns:
        How many selections were taken out.
    """
    saved, full = context.saved, context.full
    stale = [node for node in placeholders(gm) if node.name in saved and not _alike(node.meta["val"], saved[node.name])]
    for node in stale:
        node.meta["val"] = saved[node.name]
    changed = {user for node in stale for user in node.users}
    changes = 0
    for node in list(gm.graph.nodes):
        selection = node.meta.get(SELECTION)
        if node.op != "call_function" or selection is None or selection.position not in full:
            continue
        features = node.all_input_nodes[0]
        if node.target is ops.gather and selection.length != shape_of(features)[1]:
            with gm.graph.inserting_before(node):
                end = selection.start + selection.length
                features = call(gm.graph, aten.slice.Tensor, features, 1, selection.start, end)
        changed.update(node.users)
        node.replace_all_uses_with(features)
        gm.graph.erase_node(node)
        changes += 1
    propagate(gm, changed)
    return changes


def _alike(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or (one.shape == other.shape and one.stride() == other.stride())

"""Bring a joint graph into the form that detection reads: no dead nodes, and equal expressions computed once.

Before (three uses of one activation, and a gradient that nobody asks for)::

    view_1: f32[b, n] = view(x, [b, n])
    view_2: f32[b, n] = view(x, [b, n])
    mm_7:   f32[b, n] = mm(grad_out, w)          <- no user

After::

    view_1: f32[b, n] = view(x, [b, n])          <- read wherever view_1 or view_2 was

So a dead reader does not pass for a use of a gradient, and layers that read the same ``X`` read the same node.

Contract: every output has the same value as before. The partitioner does the same before it cuts; here it comes earlier.
"""

from __future__ import annotations

import logging

from torch import fx

from ... import _aot
from ..context import PassContext

log = logging.getLogger(__name__)


def normalize(gm: fx.GraphModule, context: PassContext) -> int:
    """Simplify a joint graph in place.

    Args:
        gm: a joint graph.
        context: not read.

    Returns:
        How many nodes were dropped.
    """
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    gm.graph = _aot.common_subexpressions(gm.graph)
    if dropped := before - len(gm.graph.nodes):
        log.info("normalize: dropped %d nodes", dropped)
    return dropped

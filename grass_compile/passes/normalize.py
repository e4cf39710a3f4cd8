"""Fold chains of permutes and reshapes in front of gradient slots, so that detection meets fewer spellings.

Before (a weight that the model views as ``[heads, head_dim, n]``)::

    view_5: f32[8, 64, 512] = view(mm_3, [8, 64, 512])
    view_6: f32[512, 512]   = view(view_5, [512, 512])

After::

    mm_3 itself stands in the slot

Contract: every output has the same value as before; a graph with nothing to fold is not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .detect import ALIASES, PERMUTES, permutation
from .fx_utils import call, outputs, provenance, set_outputs, shape_of

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def normalize(gm: fx.GraphModule, *, num_fwd_outputs: int) -> bool:
    """Fold the chains in front of every gradient slot of a joint graph.

    Args:
        gm: the joint graph, changed in place.
        num_fwd_outputs: how many of the outputs belong to the forward.

    Returns:
        Whether anything changed.
    """
    values = outputs(gm)
    folded = values[:num_fwd_outputs] + [_fold(gm, value) for value in values[num_fwd_outputs:]]
    if all(old is new for old, new in zip(values, folded, strict=True)):
        return False
    set_outputs(gm, folded)
    gm.graph.eliminate_dead_code()
    return True


def _fold(gm: fx.GraphModule, value: Any) -> Any:
    """The cheapest node that holds the value of ``value``."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return value
    source = value.args[0] if value.args else None
    if not isinstance(source, fx.Node):
        return value
    if value.target in ALIASES:
        return _fold(gm, source)
    if value.target in VIEWS:
        origin = source
        while origin.target in VIEWS and isinstance(origin.args[0], fx.Node):
            origin = origin.args[0]
        return value if origin is source else _reshaped(gm, origin, value)
    if value.target in PERMUTES and source.target in PERMUTES and isinstance(source.args[0], fx.Node):
        inner = permutation(source)
        order = [inner[dim] for dim in permutation(value)]
        if order == sorted(order):
            return _fold(gm, source.args[0])
    return value


def _reshaped(gm: fx.GraphModule, origin: fx.Node, value: fx.Node) -> fx.Node:
    if shape_of(origin) == shape_of(value):
        return origin
    with provenance(gm, "normalize", "", value), gm.graph.inserting_after(value):
        return call(gm.graph, aten.reshape.default, origin, list(shape_of(value)))

"""The optimizer's compact step on one weight, as a graph of its own.

::

    mul, add, ...: f32[r, n]                                  <- the traced update rule: new moments and the update
    row_update_:        grass_compile.row_update_(weight, 0, idx, update)
    copy_:  f32[r, n] = copy_(exp_avg, exp_avg_new)
    return ()

(With a dense projection, ``rank_update_`` with the basis in place of ``row_update_`` with ``idx``.)

Compiled once for all weights of one shape, it is what ``grass_compile::step_`` runs in a backward graph, and what
``opt.step()`` runs for compact gradients that have waited. Inlined in the backward it would be the same kernel, since nothing
else there reads or makes these tensors elementwise; but the compiler would see it once for every weight.

The state is written after the weight: Inductor computes what reads a tensor before it lowers a write to it, so in the other
order the update would be stored to memory first, and moments and weight would take two kernels instead of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import _torch, ops
from ..config import SiteConfig
from ..math.update import apply_all
from .fx_utils import call, inline, trace

aten = torch.ops.aten


def step_graph(config: SiteConfig, dim: int, specs: tuple[tuple[Any, ...], ...]) -> fx.GraphModule:
    """The step of one weight.

    Args:
        config: what the optimizer asked of the weight.
        dim: the stored dimension that is indexed.
        specs: ``(shape, stride, dtype, device)`` of the compact gradient, the weight, ``hyper``, the index (or what
            takes its place) and each other state tensor.

    Returns:
        A graph with these inputs and no outputs, which writes the weight and the state in place.
    """
    traced = trace(apply_all, (config, dim), specs)
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    nodes = []
    with _torch.fresh_fake_mode() as mode:
        for number, (shape, stride, dtype, device) in enumerate(specs):
            nodes.append(gm.graph.placeholder(f"input_{number}"))
            nodes[-1].meta["val"] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    _, weight, _, _, *state = nodes
    new_weight, *new_state = inline(gm.graph, traced, nodes, mode)
    base, *update = new_weight.args
    gm.graph.erase_node(new_weight)
    if base is not weight:  # weight decay: the whole weight first
        call(gm.graph, aten.copy_.default, weight, base)
    call(gm.graph, ops.IN_PLACE[new_weight.target], weight, *update)
    for old, new in zip(state, new_state, strict=True):
        if new is not old:
            call(gm.graph, aten.copy_.default, old, new)
    gm.graph.output(())
    gm.recompile()
    return gm

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

A step that raises (out of memory) has written nothing: what is written comes last, when all buffers are there. A rule that
completes a moment and goes on to multiply it with itself would have it written in between; its step is two graphs, of which the
first writes nothing and the second allocates nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .. import _aot, ops
from ..config import SiteConfig
from ..math.update import apply_all
from .fx_utils import call, copy, inline, is_view, placeholders, set_outputs, trace

aten = torch.ops.aten


def step_graphs(
    config: SiteConfig, dim: int, specs: tuple[tuple[Any, ...], ...], apart: bool = False
) -> tuple[fx.GraphModule, ...]:
    """The step of one weight.

    Args:
        config: what the optimizer asked of the weight.
        dim: the stored dimension that is indexed.
        specs: ``(shape, stride, dtype, device)`` of the compact gradient, the weight, ``hyper``, the index (or what
            takes its place) and each other state tensor.
        apart: whether what is computed and what is written are to be two graphs in any case.

    Returns:
        A graph with these inputs and no outputs, which writes the weight and the state in place; or two, the second of which
        takes the outputs of the first after these inputs.
    """
    traced = trace(apply_all, (config, dim), specs)
    gm = _aot.graph_module(torch.nn.Module(), fx.Graph())
    nodes = []
    with _aot.fresh_fake_mode() as mode:
        for number, (shape, stride, dtype, device) in enumerate(specs):
            nodes.append(gm.graph.placeholder(f"input_{number}"))
            nodes[-1].meta["val"] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    _, weight, _, _, *state = nodes
    new_weight, *new_state = inline(gm.graph, traced, nodes, mode)
    update = [new_weight]
    if new_weight.target in ops.IN_PLACE:
        base, *update = new_weight.args
        gm.graph.erase_node(new_weight)
        if base is not weight:  # weight decay: the whole weight first
            call(gm.graph, aten.copy_.default, weight, base)
        call(gm.graph, ops.IN_PLACE[new_weight.target], weight, *update)
    else:  # of rows that other ranks have stepped: all that this one owns
        call(gm.graph, aten.copy_.default, weight, new_weight)
    moments = [(old, new) for old, new in zip(state, new_state, strict=True) if new is not old]
    for old, new in moments:
        call(gm.graph, aten.copy_.default, old, new)
    gm.graph.output(())
    gm.recompile()
    computed = [argument for argument in update if isinstance(argument, fx.Node) and argument.op != "placeholder"]
    new = [node for _, node in moments]
    return _split(gm, list(dict.fromkeys([*computed, *new]))) if apart or _waits(computed, new) else (gm,)


def _waits(update: Sequence[fx.Node], moments: Sequence[fx.Node]) -> bool:
    """Whether a moment may be written while something that is not computed elementwise is still to come."""
    to_come = {node for node in _ancestors(update) if not _is_local(node)}
    return any(not to_come <= _ancestors([moment]) for moment in moments)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What ``nodes`` are computed from, themselves included."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


WRITES = {aten.copy_.default, *ops.IN_PLACE.values()}
LOCAL = {operator.getitem, aten.cat.default, aten.index.Tensor, torch.ops.grass_compile.once.default}


def _is_local(node: fx.Node) -> bool:
    """Whether it can be computed in the kernel that computes its inputs."""
    return (
        not node.all_input_nodes
        or is_view(node)
        or node.target in LOCAL
        or torch.Tag.pointwise in getattr(node.target, "tags", ())
    )


def _split(gm: fx.GraphModule, results: Sequence[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph that returns ``results``, and one that takes them after its other inputs and writes them."""
    computed: dict[fx.Node, fx.Node] = {}
    taken: dict[fx.Node, fx.Node] = {}
    compute, finish = copy(gm, computed), copy(gm, taken)
    for node in reversed(compute.graph.nodes):
        if node.target in WRITES:
            compute.graph.erase_node(node)
    set_outputs(compute, [computed[node] for node in results])
    last = placeholders(finish)[-1]
    for node in results:
        with finish.graph.inserting_after(last):
            last = finish.graph.placeholder(f"result_{node.name}")
        last.meta = dict(node.meta)
        taken[node].replace_all_uses_with(last)
    for half in (compute, finish):
        half.graph.eliminate_dead_code()
        half.recompile()
    return compute, finish

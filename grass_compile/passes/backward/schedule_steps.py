"""Give every node of ours its place in the backward graph.

Before::

    step_:  grass_compile.step_(mm, weight, hyper, idx, [exp_avg, exp_avg_sq], kernel)     <- where its anchor stood
    mm_9:   f32[b, n] = mm(grad_out, weight)
    ...

After, ``step_`` stands right behind ``mm_9``.

Contract: a write stands after every other reader of the tensors that it writes (be it through a view), and otherwise as
early as its inputs allow, so that a layer's compact step can run (and ``dY``, ``X`` and ``G`` be freed) as soon as its
gradient exists. The first collective of a bucket of gradients is waited for behind that of the next bucket, and that of the
last one behind all that is not ours, so that the backward goes on while it travels; but not in a backward that chooses new
rows, where CUDA graphs are cut. What is made from a selector alone (a random basis) stands right before its first reader: its
inputs would allow it anywhere, and all of them at once would take memory.
"""

from __future__ import annotations

import itertools

from torch import fx

from ... import ops
from ..context import PassContext
from ..fx_utils import PROVENANCE, placeholders, readers
from ..joint.rewrite import OF_SELECTOR
from .reduce import STARTS_BUCKET


def schedule_steps(gm: fx.GraphModule, context: PassContext) -> int:
    """Finish a backward graph in place.

    Args:
        gm: a backward graph without anchors.
        context: not read.

    Returns:
        How many nodes stand at another place than before.
    """
    before = {node: node.prev for node in gm.graph.nodes}
    gm.graph.eliminate_dead_code()
    _hoist(gm)
    for node in reversed([node for node in gm.graph.nodes if OF_SELECTOR in node.meta]):
        min(node.users).prepend(node)
    gm.recompile()
    return sum(before[node] is not node.prev for node in gm.graph.nodes)


def steps(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that run the step of a weight."""
    return list(gm.graph.find_nodes(op="call_function", target=ops.step_))


def written(node: fx.Node) -> list[fx.Node]:
    """What a step or a refresh writes: the weight and the state, the index and the state."""
    if node.target is ops.step_:
        return [node.args[1], *node.args[4]]  # type: ignore[list-item, misc]
    return [node.args[1], *node.args[3]] if node.target is ops.refresh_ else []  # type: ignore[list-item, misc]


def refreshes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that choose new rows; they write every input but the first."""
    return list(gm.graph.find_nodes(op="call_function", target=ops.refresh_))


def _hoist(gm: fx.GraphModule) -> None:
    """Move every node of ours up to just behind the last node that it has to follow.

    Nodes that were moved count as standing at their anchor, the node that was not moved and that they stand behind; a node
    is put behind the last one with the same anchor, so ties keep the topological order in which the walk visits them.
    """
    inputs = placeholders(gm)
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    anchors: dict[fx.Node, fx.Node] = dict.fromkeys(inputs, inputs[-1])
    last: dict[fx.Node, fx.Node] = {}
    refreshed = {source: node for node in refreshes(gm) for source in written(node)}  # read them after that
    starts = [node for node in gm.graph.nodes if STARTS_BUCKET in node.meta and not refreshed]
    following = dict(itertools.pairwise([*starts, *_last_of_others(gm)] if starts else []))
    for node in list(gm.graph.nodes):
        if PROVENANCE not in node.meta or node.op != "call_function":
            continue
        before = list(node.all_input_nodes) or inputs[-1:]
        before += [following[source] for source in before if source in following]
        before += [refreshed[source] for source in before if source in refreshed and refreshed[source] is not node]
        if node.target is ops.step_:
            before += [user for target in written(node) for user in readers(target) if user is not node and user.op != "output"]
        anchor = max((anchors.get(source, source) for source in before), key=lambda source: order[source])
        last.get(anchor, anchor).append(node)
        anchors[node], last[anchor] = anchor, node


def _last_of_others(gm: fx.GraphModule) -> list[fx.Node]:
    """The last node that is not ours and reads nothing of ours, if there is one."""
    ours: set[fx.Node] = set()
    last: list[fx.Node] = []
    for node in gm.graph.nodes:
        if PROVENANCE in node.meta or not ours.isdisjoint(node.all_input_nodes):
            ours.add(node)
        elif node.op == "call_function":
            last = [node]
    return last

"""One product for the gradients of weights that read the same activations (q, k and v; gate and up).

Before, on a CPU::

    gather:    f32[b, r] = grass_compile.gather([grad_q], [idx_q])
    permute:   f32[r, b] = permute(gather, [1, 0])
    mm:        f32[r, n] = mm(permute, x)
    ...
    mm_1:      f32[r, n] = mm(permute_1, x)                             <- of idx_k

After, where ``mm_1`` stood::

    gather:    f32[b, 2r] = grass_compile.gather([grad_q, grad_k], [idx_q, idx_k])
    permute:   f32[2r, b] = permute(gather, [1, 0])
    mm:        f32[2r, n] = mm(permute, x)
    slice:     f32[r, n] = slice(mm, 0, 0, r)
    slice_1:   f32[r, n] = slice(mm, 0, r, 2r)

A product of few rows spends much of its time on laying ``x`` out for the processor: three of 96 rows take twice as long as one of
288 (bf16, 1024 x 768). On a GPU it has not been measured, and nothing is joined there.

Only neighbours are joined: a gradient that is known waits for no product but those that read the same activations or the same
gradients. (Every layer of a decoder reads the encoder's output; their steps must not wait for the first layer's.)

Contract: what the gradients are used for stands after the last of them; nothing else moves. Runs on backward graphs, in which
every weight that forms its full gradient already does (`restore_full_grad`), so that only compact ones are left to join.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from ... import ops
from ..context import PassContext
from ..fx_utils import PROVENANCE, call, is_view, provenance, shape_of

aten = torch.ops.aten
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Compact:
    """A product ``features[:, index]^T other`` and the nodes that it is made of."""

    node: fx.Node
    permute: fx.Node
    gather: fx.Node
    other: fx.Node

    @property
    def features(self) -> list[fx.Node]:
        """What is gathered from."""
        return _nodes(self.gather.args[0])

    @property
    def index(self) -> list[fx.Node]:
        """Which features."""
        return _nodes(self.gather.args[1])


def batch_matmuls(gm: fx.GraphModule, context: PassContext) -> int:
    """Join products in place.

    Args:
        gm: a backward graph with anchors.
        context: not read.

    Returns:
        How many products fewer there are.
    """
    fewer = 0
    for alike in _alike(gm.graph):
        for products in _neighbours(alike):
            users = _between([product.node for product in products])
            if len(products) > 1 and users is not None:
                _join(gm, products, users)
                fewer += len(products) - 1
    gm.recompile()
    if fewer:
        log.info("batch_matmuls: %d products fewer", fewer)
    return fewer


def _alike(graph: fx.Graph) -> list[list[Compact]]:
    """Compact products of a CPU with one and the same matrix on their right, in the order of the graph."""
    found: dict[fx.Node, list[Compact]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        permute, other = _nodes(node.args)
        if permute.target is aten.permute.default and ops.on_cpu(node.meta["val"]):
            (gather,) = permute.all_input_nodes
            if gather.target is ops.gather:
                found.setdefault(other, []).append(Compact(node, permute, gather, other))
    return list(found.values())


def _neighbours(products: Sequence[Compact]) -> list[list[Compact]]:
    """The same with cuts where something else is multiplied in between."""
    by_node = {product.node: product for product in products}
    known = {products[0].other, *(_base(node) for product in products for node in product.features)}
    parts: list[list[Compact]] = [[]]
    node = products[0].node
    while True:
        if node in by_node:
            parts[-1].append(by_node[node])
        elif parts[-1] and _multiplies(node) and known.isdisjoint(_base(source) for source in node.all_input_nodes):
            parts.append([])
        if node is products[-1].node:
            return parts
        node = node.next


def _multiplies(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in flop_registry


def _base(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _between(products: Sequence[fx.Node]) -> list[fx.Node] | None:
    """What depends on one of the products and stands before the last, in order; None if one product depends on another."""
    reached, users, node = {products[0]}, [], products[0]
    while node is not products[-1]:
        node = node.next
        if any(source in reached for source in node.all_input_nodes):
            if node in products:
                return None
            users.append(node)
        elif node not in products:
            continue
        reached.add(node)
    return users


def _join(gm: fx.GraphModule, products: Sequence[Compact], users: Sequence[fx.Node]) -> None:
    """Compute all products as one where the last of them stands, and ``users`` behind it."""
    graph, last = gm.graph, products[-1].node
    names = ", ".join(product.node.meta[PROVENANCE][1] for product in products)
    with provenance(gm, "batch_matmuls", names, last), graph.inserting_before(last):
        features = [node for product in products for node in product.features]
        index = [node for product in products for node in product.index]
        transposed = call(graph, aten.permute.default, call(graph, ops.gather, features, index), [1, 0])
        joined = call(graph, aten.mm.default, transposed, products[0].other)
        start = 0
        for product in products:
            end = start + shape_of(product.node)[0]
            product.node.replace_all_uses_with(call(graph, aten.slice.Tensor, joined, 0, start, end))
            start = end
    after = last
    for user in users:
        after.append(user)
        after = user
    for product in products:
        for node in (product.node, product.permute, product.gather):
            if not node.users:
                graph.erase_node(node)


def _nodes(arguments: Any) -> list[fx.Node]:
    return list(arguments)

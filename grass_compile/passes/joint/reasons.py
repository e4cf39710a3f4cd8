"""Why a gradient is not understood, in sentences for people."""

from __future__ import annotations

import operator

from torch import fx

EMBEDDING = "it is an embedding table: its gradient is a scatter over tokens, not a matrix product"
TIED = "it is also used as an embedding table (tied weights), so its gradient is not a matrix product alone"
PADDED = "only a part of it is used, and its gradient is padded in a way that is not understood"
REASONS: dict[str, str] = {
    "embedding_dense_backward": EMBEDDING,
    "index_put": EMBEDDING,
    "_unsafe_index_put": EMBEDDING,
    "_unsafe_masked_index_put_accumulate": EMBEDDING,
    "convolution_backward": "it is the weight of a convolution; only matrix products can be projected",
    "select_scatter": PADDED,
    "constant_pad_nd": PADDED,
    "as_strided_scatter": PADDED,
}
REGIONS = {
    "cond": "torch.cond",
    "while_loop": "torch's while_loop",
    "scan": "torch's scan",
    "invoke_subgraph": "a torch.compiler.nested_compile_region",
}
"""Operators that hold graphs of their own, by their names, as users know them."""


class Refused(Exception):
    """Raised inside the walk with the reason why a gradient is not understood; caught by `detect`."""


def reason(node: fx.Node) -> str:
    """The sentence for an operator that ends the walk."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return reason(node.args[0])
    if any(source.op == "get_attr" and isinstance(_attribute(source), fx.GraphModule) for source in node.all_input_nodes):
        name = str(node.target)
        return f"it is used inside {REGIONS.get(name, name)}, whose own graph is not rewritten"
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    return REASONS.get(name, f"its gradient is computed by {node.target}, not by a matrix product")


def _attribute(node: fx.Node) -> object:
    return getattr(node.graph.owning_module, str(node.target), None)

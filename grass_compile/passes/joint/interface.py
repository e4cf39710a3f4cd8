"""Which placeholder of a joint graph is which input of the Dynamo graph, and which output is its gradient.

AOTAutograd says so itself: it takes tensor subclasses apart, adds tokens for ordered effects, and drops duplicates, so counting
would go wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..fx_utils import output_node, outputs, primals


@dataclasses.dataclass(frozen=True)
class Interface:
    """The inputs of a joint graph by their positions among those of the Dynamo graph.

    Attributes:
        nodes: the placeholder of each input that comes in as it is; none of a tensor subclass.
        slots: for each of them that may have a gradient, its position among the outputs of the joint graph.
        wrapped: those whose gradient is a tensor subclass, and returned in pieces.
    """

    nodes: Mapping[int, fx.Node]
    slots: Mapping[int, int]
    wrapped: frozenset[int] = frozenset()


def interface(gm: fx.GraphModule, num_fwd_outputs: int) -> Interface:
    """Read the descriptors of a joint graph; where it has none, one gradient for each primal follows the forward's outputs."""
    inputs = primals(gm)
    described: list[Any] = [node.meta.get("desc") for node in inputs]
    if all(desc is None for desc in described):
        return Interface(dict(enumerate(inputs)), {number: num_fwd_outputs + number for number in range(len(inputs))})
    nodes = {desc.idx: node for node, desc in zip(inputs, described, strict=True) if _is_plain(desc)}
    returned: Sequence[Any] = output_node(gm).meta.get("desc") or ()
    if len(returned) == len(outputs(gm)):
        gradients: list[Any] = [getattr(desc, "grad_of", None) for desc in returned]
        pieces: list[Any] = [getattr(getattr(desc, "base", None), "grad_of", None) for desc in returned]
        slots = {desc.idx: number for number, desc in enumerate(gradients) if _is_plain(desc)}
        return Interface(nodes, slots, frozenset(desc.idx for desc in pieces if _is_plain(desc)))
    counted = {node: num_fwd_outputs + number for number, node in enumerate(inputs)}
    return Interface(nodes, {position: counted[node] for position, node in nodes.items()})


def _is_plain(desc: Any) -> bool:
    return type(desc).__name__ == "PlainAOTInput"


def is_nested(joint_inputs: Sequence[object]) -> bool:
    """Whether AOTAutograd partitions a graph inside of another (``torch.compiler.nested_compile_region``): such come without
    inputs."""
    return not joint_inputs

"""Small helpers over FX graphs. No policy lives here."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .. import _aot
from ..errors import GraphError

PROVENANCE = "grass_compile"
"""``node.meta`` key of every node that we create: the name of the pass and of the weight it serves."""


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return list(gm.graph.find_nodes(op="placeholder"))


def is_tangent(node: fx.Node) -> bool:
    """Whether a joint-graph placeholder is the gradient of a forward output."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def primals(gm: fx.GraphModule) -> list[fx.Node]:
    """The placeholders of a joint graph that stand for inputs of the forward, one gradient slot for each."""
    return [node for node in placeholders(gm) if not is_tangent(node)]


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The single output node of a graph."""
    node: fx.Node = next(iter(gm.graph.find_nodes(op="output")))
    return node


def outputs(gm: fx.GraphModule) -> list[Any]:
    """The flat list of values that a graph returns; a graph with one bare output gives a list of one."""
    returned = output_node(gm).args[0]
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def set_outputs(gm: fx.GraphModule, values: Sequence[Any]) -> None:
    """Replace the flat list of values that a graph returns; the output's own metadata stays."""
    output_node(gm).args = (tuple(values),)


def depends_on(gm: fx.GraphModule, is_root: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Every node that is reached from a node for which ``is_root`` holds."""
    reached: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if is_root(node) or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def is_view(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an input, by the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def readers(node: fx.Node) -> list[fx.Node]:
    """Every node that reads the memory of ``node``, be it through views."""
    found = []
    for user in node.users:
        found.append(user)
        if user.op == "call_function" and (is_view(user) or user.target is operator.getitem):
            found += readers(user)
    return found


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The (possibly symbolic) shape that fake propagation recorded for ``node``."""
    return tuple(node.meta["val"].shape)


@contextlib.contextmanager
def provenance(gm: fx.GraphModule, pass_name: str, weight: str, template: fx.Node) -> Iterator[None]:
    """Nodes created inside get the stack trace of ``template`` and say which pass made them for which weight."""
    known = set(gm.graph.nodes)
    yield
    for node in gm.graph.nodes:
        if node not in known and PROVENANCE not in node.meta:
            node.meta[PROVENANCE] = (pass_name, weight)
            for key in ("stack_trace", "nn_module_stack", "custom"):
                if key in template.meta:
                    node.meta.setdefault(key, template.meta[key])


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` at the graph's insertion point and propagate its fake value.

    Args:
        graph: where to insert; the caller sets the insertion point.
        target: an ATen overload or one of our own ops.
        *args: nodes and plain values.
        **kwargs: plain values.

    Raises:
        GraphError: an argument has no fake value (the graph was not traced by AOTAutograd).
    """

    def value(node: fx.Node) -> Any:
        if "val" not in node.meta:
            raise GraphError(f"node {node.name} has no fake value; only graphs traced by AOTAutograd can be rewritten.")
        return node.meta["val"]

    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.map_arg(args, value), **kwargs)
    return node


def propagate(gm: fx.GraphModule, changed: Collection[fx.Node]) -> None:
    """Recompute the fake values of some nodes, and of all that depend on them."""
    stale = set(changed)
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if any(source.op == "get_attr" for source in sources):
            continue  # an operator with graphs of its own: what it returns keeps its shape
        if node.op == "call_function" and (node in stale or any(source in stale for source in sources)):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)
            stale.add(node)


def inline(graph: fx.Graph, traced: fx.GraphModule, args: Sequence[fx.Node], mode: Any = None) -> list[Any]:
    """Copy ``traced`` into ``graph`` at the insertion point.

    Args:
        graph: where to insert; the caller sets the insertion point.
        traced: a flat graph made by ``make_fx`` whose inputs correspond to ``args``.
        args: the nodes that take the place of the inputs.
        mode: the fake mode to rebuild fake values in; that of ``args`` if it is not given.

    Returns:
        What ``traced`` returns, as nodes of ``graph``.
    """
    mapping: dict[fx.Node, fx.Node] = dict(zip(placeholders(traced), args, strict=True))
    mode = mode or args[0].meta["val"].fake_mode
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copied = graph.node_copy(node, lambda n: mapping[n])
        copied.meta = {"val": _aot.tree_map_only(torch.Tensor, lambda t: like(mode, t), node.meta["val"])}
        mapping[node] = copied
    return [mapping[value] for value in outputs(traced)]


def specs_of(nodes: Sequence[fx.Node]) -> tuple[tuple[Any, ...], ...]:
    """``(shape, stride, dtype, device)`` of each node's value."""
    values = [node.meta["val"] for node in nodes]
    return tuple((tuple(value.shape), tuple(value.stride()), value.dtype, value.device) for value in values)


@functools.lru_cache(maxsize=256)
def trace(function: Callable[..., Any], settings: tuple[Any, ...], specs: tuple[tuple[Any, ...], ...]) -> fx.GraphModule:
    """Trace a function over tensors with Inductor's decompositions; weights of one shape share the trace.

    Only what is traced so is inlined, since operators that have a decomposition must not be inserted by hand.

    Args:
        function: takes ``settings``, then tensors; returns a tuple of tensors.
        settings: everything that is not a tensor.
        specs: ``(shape, stride, dtype, device)`` of each tensor.
    """

    def traceable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new: tuple[torch.Tensor, ...] = function(*settings, *tensors)
        return new

    with FakeTensorMode():
        args = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in specs]
        traced = make_fx(traceable, decomposition_table=_aot.decompositions())(*args)
    traced.graph.eliminate_dead_code()
    return traced


def like(mode: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor of ``mode`` with the metadata of ``tensor``."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def op_counts(gm: fx.GraphModule) -> dict[str, int]:
    """How often each operator stands in the graph, for logs and tests."""
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts


def copy(gm: fx.GraphModule, mapping: dict[fx.Node, fx.Node] | None = None) -> fx.GraphModule:
    """A copy of a traced graph with nodes of its own and the same metadata; ``mapping`` is filled with the copy of each node."""
    graph = fx.Graph()
    mapping = {} if mapping is None else mapping
    graph.output(graph.graph_copy(gm.graph, mapping)).meta = dict(output_node(gm).meta)
    return _aot.graph_module(gm, graph)

"""Replace each anchor of a backward graph by what this backward does with the gradient: the optimizer's compact step, inlined.

Before (one weight of rank r along its rows)::

    mm:     f32[r, n]
    anchor: f32[r, n] = grass_compile.anchor(mm, weight, hyper, [idx, exp_avg, exp_avg_sq], [r, n], 0)
    return (..., anchor, ...)

After, for the action ``step``::

    mul, add, ...: f32[r, n]                                  <- the traced update rule: new moments and the update
    row_update: f32[m, n] = grass_compile.row_update(weight, 0, idx, update)
    return (..., None, ...)                                   <- and a list of new values for `place` to write

For ``keep`` and ``choose`` the compact gradient is returned; the update rule stays out.

Only what is traced with `make_fx` and Inductor's decomposition table is inlined, since operators that have a decomposition must
not be inserted by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .. import _torch
from ..config import SiteConfig
from ..errors import GraphError
from ..runtime import ops
from ..runtime.step import Action, apply, backward_step, clip_scale, graph_state, results, scaled
from .anchor import anchors
from .fx_utils import inline, output_node, outputs, provenance, set_outputs
from .records import Projection


@dataclasses.dataclass(frozen=True)
class Write:
    """A new value for an input of a graph.

    Attributes:
        target: the placeholder.
        value: a node; for a weight, a ``row_update``.
        weight: the name of the weight that it belongs to.
    """

    target: fx.Node
    value: fx.Node
    weight: str


def fuse(
    gm: fx.GraphModule,
    *,
    projections: Sequence[Projection],
    refresh: Sequence[bool],
    actions: Sequence[Action],
    clip: bool = False,
) -> list[Write]:
    """Replace every anchor, in place.

    Args:
        gm: a backward graph.
        projections: what the anchors' numbers stand for.
        refresh: for each projection, whether its anchor holds the full gradient.
        actions: for each projection, what to do.
        clip: whether to clip all gradients by their common norm; every action is then ``step``.

    Returns:
        What has to be written.

    Raises:
        GraphError: a tensor that has to be written is not an input of the backward graph.
    """
    norms = list(gm.graph.find_nodes(op="call_function", target=ops.norm))
    if clip:
        return _clipped(gm, norms[0], projections, refresh)
    values, writes = outputs(gm), []
    for node in norms:
        values[values.index(node)] = None
    for node in anchors(gm):
        arguments: Any = node.args
        number = arguments[-1]
        projection, action = projections[number], actions[number]
        new = _inline(gm, node, projection, refresh[number], action)
        values[values.index(node)] = new.pop("gradient", None)
        writes += _writes(node, projection, new)
    set_outputs(gm, values)
    return writes


def _clipped(gm: fx.GraphModule, norm: fx.Node, projections: Sequence[Projection], refresh: Sequence[bool]) -> list[Write]:
    """First every compact gradient, then the norm of all gradients and the factor, then the steps and the scaled rest."""
    values, writes, found = outputs(gm), [], anchors(gm)
    arguments: Any = [node.args for node in found]
    _, dense = norm.args
    kept = []
    for node, (*_, number) in zip(found, arguments, strict=True):
        kept.append(_inline(gm, node, projections[number], refresh[number], "choose" if refresh[number] else "keep"))
    with provenance(gm, "fuse", "norm", norm), gm.graph.inserting_before(norm):
        inputs = [arguments[0][2], *(new["gradient"] for new in kept), *dense]  # type: ignore[misc]
        total, scale = inline(gm.graph, trace_step(clip_scale, (), _specs(inputs)), inputs)
        small = {g: inline(gm.graph, trace_step(scaled, (), _specs([g, scale])), [g, scale])[0] for g in inputs[1:]}
    for node, (_, weight, hyper, state, _, number), new in zip(found, arguments, kept, strict=True):
        projection = projections[number]
        names = graph_state(projection.config)
        args = [small[new.pop("gradient")], weight, hyper, *(new.get(name, old) for name, old in zip(names, state, strict=True))]
        with provenance(gm, "fuse", projection.name, node), gm.graph.inserting_before(norm):
            traced = trace_step(_apply_all, (projection.config, projection.dim, projection.rank), _specs(args))
            stepped = dict(zip(("weight", *names[1:]), inline(gm.graph, traced, args), strict=True))
        writes += _writes(node, projection, {**new, **stepped})
        values[values.index(node)] = None
    set_outputs(gm, [total if value is norm else small.get(value, value) for value in values])
    return writes


def _inline(gm: fx.GraphModule, node: fx.Node, projection: Projection, refresh: bool, action: Action) -> dict[str, fx.Node]:
    """Inline one action where an anchor stands; the new values by name."""
    arguments: Any = node.args
    gradient, weight, hyper, state, _, _ = arguments
    args = [gradient, weight, hyper, *state]
    settings = (projection.config, projection.dim, projection.rank, refresh, action)
    with provenance(gm, "fuse", projection.name, node), gm.graph.inserting_before(node):
        values = inline(gm.graph, trace_step(backward_step, settings, _specs(args)), args)
    return dict(zip(results(projection.config, refresh, action), values, strict=True))


def _writes(node: fx.Node, projection: Projection, new: Mapping[str, fx.Node]) -> list[Write]:
    """What has to be written for one anchor.

    Raises:
        GraphError: the tensor is not an input of this graph.
    """
    arguments: Any = node.args
    _, weight, _, state, _, _ = arguments
    targets = {"weight": weight, **dict(zip(graph_state(projection.config), state, strict=True))}
    return [Write(_input(targets[name], projection.name), value, projection.name) for name, value in new.items()]


def _input(node: fx.Node, weight: str) -> fx.Node:
    if node.op != "placeholder":
        raise GraphError(f"{weight}: its tensor {node.name} does not reach the backward graph; please report this.")
    return node


def standalone(config: SiteConfig, dim: int, rank: int, specs: tuple[tuple[Any, ...], ...]) -> tuple[fx.GraphModule, list[Write]]:
    """The graph of a step by itself, for a compact gradient that a backward has left.

    Args:
        config: what the optimizer asked of the weight.
        dim: the stored dimension that is indexed.
        rank: r.
        specs: ``(shape, stride, dtype, device)`` of the compact gradient, the weight, ``hyper`` and each state tensor.

    Returns:
        A graph with these inputs and no outputs yet, and what has to be written.
    """
    traced = trace_step(_apply_all, (config, dim, rank), specs)
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    nodes = []
    with FakeTensorMode() as mode:
        for number, (shape, stride, dtype, device) in enumerate(specs):
            nodes.append(gm.graph.placeholder(f"input_{number}"))
            nodes[-1].meta["val"] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    output = gm.graph.output(())
    with provenance(gm, "fuse", "step", output), gm.graph.inserting_before(output_node(gm)):
        new = inline(gm.graph, traced, nodes, mode)
    _, weight, _, _, *rest = nodes
    return gm, [Write(target, value, "step") for target, value in zip((weight, *rest), new, strict=True)]


def _apply_all(
    config: Any, dim: int, rank: int, gradient: torch.Tensor, weight: torch.Tensor, hyper: torch.Tensor, *state: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    index, *rest = state
    return apply(config, dim, gradient, weight, hyper, index, rest)


def _specs(nodes: Sequence[fx.Node]) -> tuple[tuple[Any, ...], ...]:
    values = [node.meta["val"] for node in nodes]
    return tuple((tuple(value.shape), tuple(value.stride()), value.dtype, value.device) for value in values)


@functools.lru_cache(maxsize=256)
def trace_step(step: Callable[..., Any], settings: tuple[Any, ...], specs: tuple[tuple[Any, ...], ...]) -> fx.GraphModule:
    """Trace a step function with Inductor's decompositions; layers of one shape share the trace.

    Args:
        step: takes ``settings``, then tensors.
        settings: everything that is not a tensor.
        specs: ``(shape, stride, dtype, device)`` of each tensor.
    """

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new: tuple[torch.Tensor, ...] = step(*settings, *tensors)
        return new

    with FakeTensorMode():
        args = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in specs]
        traced = make_fx(function, decomposition_table=_torch.decompositions())(*args)
    traced.graph.eliminate_dead_code()
    return traced

"""Replace each anchor of a backward graph by what this backward does with the gradient: the optimizer's compact step, inlined.

Before (one weight of rank r along its rows)::

    mm:     f32[r, n]
    anchor: f32[r, n] = grass_compile.anchor(mm, weight, hyper, [idx, exp_avg, exp_avg_sq], [r, n], 0)
    return (..., anchor, ...)

After, for the action ``step``::

    mul, add, ...: f32[r, n]                                  <- the traced update rule: new moments and the update
    row_update: f32[m, n] = grass_compile.row_update(weight, 0, idx, update)
    return (..., None, ...)                                   <- and a list of new values for `place` to write

For ``keep`` and ``choose`` the compact gradient is returned; the update rule stays out. On a refresh, ``refresh_`` makes the
compact gradient and writes the index and the state in place, so that what follows is the regular step, to the very kernel.

Only what is traced with `make_fx` and Inductor's decomposition table is inlined, since operators that have a decomposition must
not be inserted by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .. import _torch
from ..config import SiteConfig
from ..errors import GraphError
from ..runtime import ops
from ..runtime.step import Action, apply_all, clip_scale, kept, scaled, selected
from .anchor import anchors
from .fx_utils import call, inline, output_node, outputs, provenance, set_outputs
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
        if action == "skip":
            values[values.index(node)] = None
            continue
        with provenance(gm, "fuse", projection.name, node), gm.graph.inserting_before(node):
            gradient = _compact(gm, node, projection, refresh[number], action)
            if action == "step":
                writes += _step(gm, node, gradient, projection)
            values[values.index(node)] = None if action == "step" else _trace(gm, kept, (), [gradient])[0]
    set_outputs(gm, values)
    return writes


def _clipped(gm: fx.GraphModule, norm: fx.Node, projections: Sequence[Projection], refresh: Sequence[bool]) -> list[Write]:
    """First every compact gradient, then the norm of all gradients and the factor, then the steps and the scaled rest."""
    values, writes, found = outputs(gm), [], anchors(gm)
    arguments: Any = norm.args
    numbers = [int(node.args[-1]) for node in found]  # type: ignore[arg-type]
    gradients = []
    for node, number in zip(found, numbers, strict=True):
        with provenance(gm, "fuse", projections[number].name, node), gm.graph.inserting_before(node):
            gradients.append(_compact(gm, node, projections[number], refresh[number], "step"))
    with provenance(gm, "fuse", "norm", norm), gm.graph.inserting_before(norm):
        total, scale = _trace(gm, clip_scale, (), [found[0].args[2], *gradients, *arguments[1]])
        small = {gradient: _trace(gm, scaled, (), [gradient, scale])[0] for gradient in arguments[1]}
    for node, number, gradient in zip(found, numbers, gradients, strict=True):
        with provenance(gm, "fuse", projections[number].name, node), gm.graph.inserting_before(norm):
            (wide,) = _trace(gm, kept, (), [gradient])
            writes += _step(gm, node, _trace(gm, scaled, (), [wide, scale])[0], projections[number])
        values[values.index(node)] = None
    set_outputs(gm, [total if value is norm else small.get(value, value) for value in values])
    return writes


def _compact(gm: fx.GraphModule, node: fx.Node, projection: Projection, refresh: bool, action: Action) -> fx.Node:
    """The compact gradient where an anchor stands; on a refresh, that of new rows unless older ones are to be kept."""
    arguments: Any = node.args
    gradient, _, _, (index, *state), _, _ = arguments
    if not refresh:
        return gradient  # type: ignore[no-any-return]
    if action == "keep":
        (compact,) = _trace(gm, selected, (projection.dim,), [gradient, index])
        return compact
    on_refresh = projection.config.on_refresh
    if action == "choose":  # the state follows when the weight moves
        state, on_refresh = [], "reset"
    return call(gm.graph, ops.refresh_, gradient, index, state, projection.dim, projection.rank, on_refresh)


def _step(gm: fx.GraphModule, node: fx.Node, gradient: fx.Node, projection: Projection) -> list[Write]:
    """Inline the step of one weight; returns what has to be written.

    Raises:
        GraphError: one of these tensors is not an input of this graph.
    """
    arguments: Any = node.args
    _, weight, hyper, (index, *state), _, _ = arguments
    new = _trace(gm, apply_all, (projection.config, projection.dim), [gradient, weight, hyper, index, *state])
    targets = zip((weight, *state), new, strict=True)
    return [Write(_input(target, projection.name), value, projection.name) for target, value in targets]


def _trace(gm: fx.GraphModule, function: Callable[..., Any], settings: tuple[Any, ...], args: list[Any]) -> list[fx.Node]:
    """Trace a function over tensors and inline it at the insertion point."""
    return inline(gm.graph, trace_step(function, settings, _specs(args)), args)


def _input(node: fx.Node, weight: str) -> fx.Node:
    if node.op != "placeholder":
        raise GraphError(f"{weight}: its tensor {node.name} does not reach the backward graph; please report this.")
    return node


def standalone(config: SiteConfig, dim: int, specs: tuple[tuple[Any, ...], ...]) -> tuple[fx.GraphModule, list[Write]]:
    """The graph of a step by itself, for a compact gradient that a backward has left.

    Args:
        config: what the optimizer asked of the weight.
        dim: the stored dimension that is indexed.
        specs: ``(shape, stride, dtype, device)`` of the compact gradient, the weight, ``hyper`` and each state tensor.

    Returns:
        A graph with these inputs and no outputs yet, and what has to be written.
    """
    traced = trace_step(apply_all, (config, dim), specs)
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

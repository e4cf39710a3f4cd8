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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .. import _torch
from ..config import SiteConfig
from ..errors import GraphError
from ..runtime.step import Action, apply, backward_step, graph_state, results
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
    gm: fx.GraphModule, *, projections: Sequence[Projection], refresh: Sequence[bool], actions: Sequence[Action]
) -> list[Write]:
    """Replace every anchor, in place.

    Args:
        gm: a backward graph.
        projections: what the anchors' numbers stand for.
        refresh: for each projection, whether its anchor holds the full gradient.
        actions: for each projection, what to do.

    Returns:
        What has to be written.

    Raises:
        GraphError: a tensor that has to be written is not an input of the backward graph.
    """
    values, writes = outputs(gm), []
    for node in anchors(gm):
        arguments: Any = node.args
        gradient, weight, hyper, state, _, number = arguments
        projection, action = projections[number], actions[number]
        names = graph_state(projection.config)
        targets = {"weight": weight, **dict(zip(names, state, strict=True))}
        args = [gradient, weight, hyper, *state]
        specs = tuple(_spec(arg.meta["val"]) for arg in args)
        traced = trace_step(backward_step, (projection.config, projection.dim, projection.rank, refresh[number], action), specs)
        with provenance(gm, "fuse", projection.name, node), gm.graph.inserting_before(node):
            new = dict(zip(results(projection.config, refresh[number], action), inline(gm.graph, traced, args), strict=True))
        slot = values.index(node)
        values[slot] = new.pop("gradient", None)
        writes += [Write(_input(targets[name], projection.name), value, projection.name) for name, value in new.items()]
    set_outputs(gm, values)
    return writes


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


def _spec(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), tuple(value.stride()), value.dtype, value.device


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

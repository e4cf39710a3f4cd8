"""Append the optimizer's compact step to the joint graph, in place of the weight gradients.

Before (one weight of rank r along its rows)::

    mm:         f32[r, n]                                     <- made by `rewrite` on a regular step; the slot on a refresh
    return (loss, ..., grad_weight, None, None, ...)          <- one slot per primal

After::

    mul, add, ...: f32[r, n]                                  <- the traced update rule: new moments and the update
    row_update: f32[m, n] = grass_compile.row_update(weight, 0, idx, update)
    copy:       f32[r, n] = copy(exp_avg, add)                <- likewise exp_avg_sq, step and, on a refresh, idx
    return (loss, ..., row_update, copy, ...)

The slot of the weight and of each of its state tensors now holds the *new value* of that input, made by a functional operator
that names the input which it replaces. So the graph stays functional and the partitioner may treat it like any other, and
every input that is to be written reaches the backward; `place` turns these operators into writes there.

Contract: slots of other inputs stay as they are. The rule is traced with Inductor's decompositions and inlined, since
operators that have one must not be inserted by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .. import _torch
from ..runtime.step import graph_state, refresh_step, regular_step
from .fx_utils import PROVENANCE, call, inline, outputs, provenance, set_outputs
from .records import Site

aten = torch.ops.aten


def fuse(
    gm: fx.GraphModule,
    *,
    sites: tuple[Site, ...],
    compact: Mapping[int, fx.Node],
    state: Mapping[int, Mapping[str, fx.Node]],
    weights: Mapping[int, fx.Node],
    slots: Mapping[fx.Node, int],
) -> dict[int, tuple[int, str]]:
    """Inline each site's step and put the new values into the gradient slots.

    Args:
        gm: the joint graph, changed in place.
        sites: every site; those missing from ``compact`` refresh, from the full gradient in their slot.
        compact: compact gradients by weight position.
        state: for each weight position, the placeholders of its state tensors and of ``hyper``.
        weights: for each weight position, the weight's placeholder.
        slots: for each primal, the position of its gradient slot among all outputs.

    Returns:
        For each output position that now holds a new value, the weight's position and what it is the new value of
        (``weight`` or the name of a state tensor).
    """
    values = outputs(gm)
    written: dict[int, tuple[int, str]] = {}
    last = next(iter(gm.graph.find_nodes(op="output")))
    for site in sites:
        position = site.weight.position
        with provenance(gm, "fuse", site.weight.name, site.slot), gm.graph.inserting_before(last):
            new = _inline_step(gm, site, compact.get(position), weights[position], state[position])
            for name, value in new.items():
                primal = weights[position] if name == "weight" else state[position][name]
                values[slots[primal]] = value if name == "weight" else call(gm.graph, aten.copy.default, primal, value)
                written[slots[primal]] = (position, name)
    for node in gm.graph.nodes:
        if node.meta.get(PROVENANCE, ("",))[0] == "fuse":
            node.meta["partitioner_tag"] = "must_be_in_backward"
    set_outputs(gm, values)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return written


def _inline_step(
    gm: fx.GraphModule, site: Site, compact: fx.Node | None, weight: fx.Node, state: Mapping[str, fx.Node]
) -> dict[str, fx.Node]:
    """Inline the step of one site; returns the new values by name."""
    config = site.weight.config
    names = graph_state(config)
    gradient = site.slot if compact is None else compact
    args = [gradient, weight, state["hyper"], *(state[name] for name in names)]
    specs = tuple(_spec(node.meta["val"]) for node in args)
    step = refresh_step if compact is None else regular_step
    traced = trace_step(step, config, site.dim, site.rank, specs)
    written = ("weight", *names) if compact is None else ("weight", *names[1:])
    return dict(zip(written, inline(gm.graph, traced, args), strict=True))


def _spec(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), tuple(value.stride()), value.dtype, value.device


@functools.lru_cache(maxsize=256)
def trace_step(step: Callable[..., Any], config: Any, dim: int, rank: int, specs: tuple[tuple[Any, ...], ...]) -> fx.GraphModule:
    """Trace a step function with Inductor's decompositions; layers of one shape share the trace.

    Args:
        step: `regular_step` or `refresh_step`.
        config: the weight's `SiteConfig`.
        dim: the stored dimension that is indexed.
        rank: number of selected rows.
        specs: ``(shape, stride, dtype, device)`` of the gradient, the weight, ``hyper`` and each state tensor.
    """

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results: tuple[torch.Tensor, ...] = step(config, dim, rank, *tensors)
        return results

    with FakeTensorMode():
        args = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in specs]
        traced = make_fx(function, decomposition_table=_torch.decompositions())(*args)
    traced.graph.eliminate_dead_code()
    return traced

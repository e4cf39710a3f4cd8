"""Replace each anchor of a backward graph by what this backward does with the gradient: the optimizer's compact step, in place.

Before (one weight of rank r along its rows)::

    mm:     f32[r, n]
    anchor: f32[r, n] = grass_compile.anchor(mm, weight, hyper, [idx, exp_avg, exp_avg_sq], None, [r, n], 0)
    return (..., anchor, ...)

After, for the action ``step``::

    step_:  grass_compile.step_(mm, weight, hyper, idx, [exp_avg, exp_avg_sq], kernel)     <- the traced and compiled rule
    return (..., None, ...)

For ``keep`` and ``choose`` the compact gradient is returned instead. On a refresh, ``refresh_`` makes the compact gradient and
writes the index and the state in place, so that what follows is the regular step, to the very kernel. Where rows are chosen by
estimated scores, ``propose_`` writes those to take next, and the step is that of the old ones.

Contract: what is written is an input of the graph; `schedule_steps` gives each node its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ... import ops
from ...errors import GraphError
from ...math.layout import Action, graph_state, layout_of, step_state
from ...math.projection import SELECTORS
from ...math.update import clip_scales, kept, scaled, selected
from ...ops import scores
from ..context import PassContext
from ..fx_utils import call, inline, outputs, provenance, set_outputs, specs_of, trace
from ..joint.anchor import anchors
from ..records import Projection
from .reduce import gathered, of_chosen, scores_of_parts

log = logging.getLogger(__name__)


def lower_anchors(gm: fx.GraphModule, context: PassContext) -> int:
    """Replace every anchor, in place.

    Args:
        gm: a backward graph.
        context: says what to do with each gradient, and which anchors hold a full one.

    Returns:
        How many anchors there were.

    Raises:
        GraphError: a tensor that has to be written is not an input of the backward graph.
    """
    plan, actions = context.planned, context.actions
    projections, kernels, refresh = plan.projections, plan.kernels, context.refresh
    log.info("lower_anchors: %d weights, %s", len(actions), ", ".join(f"{actions.count(a)} {a}" for a in sorted(set(actions))))
    norms = list(gm.graph.find_nodes(op="call_function", target=ops.norm))
    if context.clip:
        _clipped(gm, norms[0], projections, kernels, refresh)
        return len(actions)
    values = outputs(gm)
    for node in norms:
        values[values.index(node)] = None
    for node in anchors(gm):
        arguments: Any = node.args
        number = arguments[-1]
        projection, action = projections[number], actions[number]
        if action == "skip":
            values[values.index(node)] = None
            continue
        with provenance(gm, "lower_anchors", projection.name, node), gm.graph.inserting_before(node):
            gradient = _compact(gm, node, projection, refresh[number], action)
            if action == "step":
                _step(gm, node, gradient, projection, kernels[number])
            values[values.index(node)] = None if action == "step" else _trace(gm, kept, (), [gradient])[0]
    set_outputs(gm, values)
    return len(actions)


def _clipped(
    gm: fx.GraphModule, norm: fx.Node, projections: Sequence[Projection], kernels: Sequence[str], refresh: Sequence[bool]
) -> None:
    """First every compact gradient, then the norm of all gradients and the factors, then the steps and the scaled rest."""
    values, found = outputs(gm), anchors(gm)
    arguments: Any = norm.args
    numbers = [int(node.args[-1]) for node in found]  # type: ignore[arg-type]
    gradients = []
    for node, number in zip(found, numbers, strict=True):
        with provenance(gm, "lower_anchors", projections[number].name, node), gm.graph.inserting_before(node):
            gradients.append(_compact(gm, node, projections[number], refresh[number], "step"))
    with provenance(gm, "lower_anchors", "norm", norm), gm.graph.inserting_before(norm):
        checked = projections[0].config.checked
        total, *scales = _trace(gm, clip_scales, (checked,), [found[0].args[2], *gradients, *arguments[1]])
        own, rest = scales[: len(gradients)], scales[len(gradients) :]
        dense = zip(arguments[1], rest, strict=True)
        small = {gradient: _trace(gm, scaled, (), [gradient, scale])[0] for gradient, scale in dense}
    for node, number, gradient, scale in zip(found, numbers, gradients, own, strict=True):
        with provenance(gm, "lower_anchors", projections[number].name, node), gm.graph.inserting_before(norm):
            (wide,) = _trace(gm, kept, (), [gradient])
            _step(gm, node, _trace(gm, scaled, (), [wide, scale])[0], projections[number], kernels[number])
        values[values.index(node)] = None
    set_outputs(gm, [total if value is norm else small.get(value, value) for value in values])


def _compact(gm: fx.GraphModule, node: fx.Node, projection: Projection, refresh: bool, action: Action) -> fx.Node:
    """The compact gradient where an anchor stands; on a refresh, that of new rows unless older ones are to be kept."""
    arguments: Any = node.args
    gradient, state, config = arguments[0], _state(node, projection), projection.config
    index, noise, proposed = state.pop(SELECTORS[config.projection]), state.pop("noise", None), state.pop("proposed", None)
    due, _, _ = state.pop("due", None), state.pop("nonfinite", None), state.pop("square_sum")
    if refresh and proposed is not None and action != "keep":
        groups = [] if config.layout is None else [dim.group for dim in config.layout.mesh]
        call(gm.graph, scores.propose_, arguments[4], noise, proposed, due, config.chosen_by, groups)
    if not refresh or proposed is not None:
        return gradient  # type: ignore[no-any-return]
    if action == "keep":
        (compact,) = _trace(gm, selected, (config.projection, projection.dim, projection.rank), [gradient, index])
        return compact
    # Where the weight does not move, its state follows when it does.
    if action != "step":
        state = {}
    layouts = "".join(layout_of(config.rule, name)[0] for name in state)
    how = config.on_refresh, config.chosen_by, layouts, config.checked
    where = projection.dim, projection.rank
    layout = of_chosen(projection)
    told = scores_of_parts(gm.graph, gradient, projection.dim, layout) if layout is not None else None
    made = call(gm.graph, ops.refresh_, gradient, index, noise, list(state.values()), *where, *how, told)
    if layout is None or layout == config.layout:
        return made
    return gathered(gm.graph, made, layout, projection.shape[1 - projection.dim])


def _state(node: fx.Node, projection: Projection) -> dict[str, fx.Node]:
    """The state that an anchor was given, by name."""
    arguments: Any = node.args
    return dict(zip(graph_state(projection.config), arguments[3], strict=True))


def _step(gm: fx.GraphModule, node: fx.Node, gradient: fx.Node, projection: Projection, kernel: str) -> None:
    """Insert the step of one weight.

    Raises:
        GraphError: one of the tensors that it writes is not an input of this graph.
    """
    arguments: Any = node.args
    _, weight, hyper, *_ = arguments
    named = _state(node, projection)
    selector, *state = (named[name] for name in step_state(projection.config))
    for written in (weight, *state):
        if written.op != "placeholder":
            raise GraphError(
                f"{projection.name}: its tensor {written.name} does not reach the backward graph; please report this."
            )
    call(gm.graph, ops.step_, gradient, weight, hyper, selector, state, kernel)


def _trace(gm: fx.GraphModule, function: Callable[..., Any], settings: tuple[Any, ...], args: list[Any]) -> list[fx.Node]:
    """Trace a function over tensors and inline it at the insertion point."""
    return inline(gm.graph, trace(function, settings, specs_of(args)), args)

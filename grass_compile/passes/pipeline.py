"""The passes, in order.

::

    joint graph --normalize--> --detect--> sites --rewrite, score--> compact gradients --anchor--> one operator per site
                                                                                               |  min-cut partition
    forward graph, backward graph with anchors  <----------------------------------------------+
         |              |
         |              +--restore_full_grad--> --batch_matmuls--> --reduce, lower_anchors--> --schedule_steps--> --verify-->
         |                                                           a backward for each way to use the gradients
         +--restore_full_grad, forget_samples--> a forward that keeps what that backward reads

One trace and one partition serve every step: copies of the two halves are finished when they are first needed.

Every pass is a function ``pass_(gm, context) -> changes`` that changes its graph in place; `PassContext` says what it may know,
and carries what passes hand on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from .. import _aot
from ..math.layout import Action
from .backward.batch_matmuls import batch_matmuls
from .backward.lower_anchors import lower_anchors
from .backward.reduce import reduce
from .backward.restore_full_grad import restore_full_grad
from .backward.schedule_steps import schedule_steps
from .backward.verify import verify
from .context import PassContext
from .fx_utils import copy, op_counts
from .joint import costs
from .joint.anchor import anchor
from .joint.detect import activations, detect
from .joint.interface import interface, is_nested
from .joint.normalize import normalize
from .joint.rewrite import rewrite
from .joint.score import forget_samples, score
from .records import Analysis, Plan, Projection, Refusal, Site, WeightInput

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule, PassContext], int]

JOINT: tuple[Pass, ...] = (normalize, detect, rewrite, score, anchor)
"""Over the joint graph, before the partition. The user's own come first, so that `detect` sees what they leave."""

FORWARD: tuple[Pass, ...] = (restore_full_grad, forget_samples)
"""Over a copy of the forward, for a set of weights that choose new rows."""

BACKWARD: tuple[Pass, ...] = (restore_full_grad, batch_matmuls, reduce, lower_anchors, schedule_steps, verify)
"""Over a copy of the backward, for each way to use the gradients. The user's own come before `verify`, which checks them too."""

PASSES = ("normalize", "detect", "rewrite", "score", "anchor", "batch_matmuls", "lower_anchors", "schedule_steps", "verify")
"""The names that ``options={"disable_passes": [...]}`` takes. Without detect, score, anchor, lower_anchors or schedule_steps
every weight stays dense; without rewrite the full gradient is formed and its rows are taken from it; without batch_matmuls every
weight has a product of its own; without verify nothing checks the result."""

ESSENTIAL = ("detect", "score", "anchor", "lower_anchors", "schedule_steps")


class PlanMismatch(Exception):
    """The joint graph was traced with other inputs than those of the plan that is made of what was found in it, which it
    carries."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__("the sites of this graph differ from the plan")
        self.analysis = analysis


def run(passes: Sequence[Pass], gm: fx.GraphModule, context: PassContext) -> None:
    """Run passes over a graph, in order.

    Args:
        passes: all but those that are disabled are run; `rewrite` sees to it itself.
        gm: changed in place.
        context: for all of them.
    """
    for pass_ in passes:
        if pass_.__name__ in context.disabled and pass_ is not rewrite:
            continue
        before = op_counts(gm) if log.isEnabledFor(logging.DEBUG) else {}
        changes = pass_(gm, context)
        after_pass(pass_.__name__, gm, changes, before)


def after_pass(name: str, gm: fx.GraphModule, changes: int, before: Mapping[str, int]) -> None:
    """Log what a pass did to the operators of a graph. (The tests replace this, to check the graph too.)"""
    if changes and log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %d changes, operators %s", name, changes, _difference(before, op_counts(gm)))


def find(
    gm: fx.GraphModule,
    *,
    weights: Sequence[WeightInput],
    num_fwd_outputs: int,
    disabled: Sequence[str] = (),
    joint_passes: Sequence[Pass] = (),
) -> tuple[tuple[Site, ...], Analysis]:
    """Run the analysing passes over a joint graph.

    Args:
        gm: the joint graph; `normalize` may simplify it.
        weights: what the optimizer wants projected.
        num_fwd_outputs: how many of the outputs belong to the forward.
        disabled: names of passes to leave out.
        joint_passes: the user's, to be run first.

    Returns:
        The sites, and the same free of graph nodes.
    """
    context = PassContext(tuple(weights), num_fwd_outputs, tuple(disabled))
    analysis = _analyse(gm, context, joint_passes)
    return context.findings.sites, analysis


def _analyse(gm: fx.GraphModule, context: PassContext, joint_passes: Sequence[Pass]) -> Analysis:
    missing = [name for name in ESSENTIAL if name in context.disabled]
    if missing:
        return Analysis((), tuple(Refusal(weight, f"pass {missing[0]!r} is disabled") for weight in context.weights))
    run((*joint_passes, *JOINT[: 1 + JOINT.index(detect)]), gm, context)
    numbers: dict[Any, int] = {}
    found = context.findings
    projections = [_projection(site, numbers.setdefault(activations(site), len(numbers))) for site in found.sites]
    return Analysis(tuple(projections), found.refusals)


def _projection(site: Site, number: int) -> Projection:
    weight = site.weight
    tokens = costs.hint(costs.token_count(site))
    return Projection(
        weight.name,
        weight.position,
        weight.config,
        site.choice.axis,
        site.dim,
        site.rank,
        site.shape,
        site.choice.why,
        tokens,
        None if activations(site) is None else number,
    )


def transform(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    asked: Plan,
    decide: Callable[[Analysis], Plan],
    num_fwd_outputs: int,
    **kwargs: object,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Look at a joint graph, rewrite it and partition it; in place of a partitioner.

    Args:
        gm: the joint graph.
        joint_inputs: its example inputs.
        asked: what was traced for: the weights, and the inputs that the graph takes for them.
        decide: makes of what was found the plan that is compiled, which takes the same inputs. It may raise (`PlanMismatch`) to
            go no further.
        num_fwd_outputs: how many of the outputs belong to the forward.
        **kwargs: for torch's min-cut partitioner.

    Returns:
        The forward graph, and the backward graph with anchors; `finish_forward` and `finish_backward` make runnable copies.
    """
    partition = functools.partial(_aot.min_cut_rematerialization_partition, num_fwd_outputs=num_fwd_outputs, **kwargs)
    if is_nested(joint_inputs):
        return partition(gm, joint_inputs)  # type: ignore[no-any-return]
    _aot.trace_graph("grass_joint_before", gm)
    looked = PassContext(asked.weights, num_fwd_outputs, asked.disabled)
    plan = decide(_analyse(gm, looked, asked.joint_passes))
    rest = JOINT[1 + JOINT.index(detect) :]
    known = interface(gm, num_fwd_outputs)
    run(rest, gm, PassContext(plan.weights, num_fwd_outputs, plan.disabled, plan, known, looked.findings))
    _aot.trace_graph("grass_joint_after", gm)
    return partition(gm, joint_inputs)  # type: ignore[no-any-return]


def finish_forward(gm: fx.GraphModule, plan: Plan, refresh: tuple[bool, ...]) -> fx.GraphModule:
    """A copy of a forward graph that keeps what the backward needs.

    Args:
        gm: the forward graph that `transform` returned.
        plan: the plan it was made for.
        refresh: for each projection, whether its backward chooses new rows.
    """
    gm = copy(gm)
    run(FORWARD, gm, PassContext(plan=plan, disabled=plan.disabled, refresh=refresh))
    gm.recompile()
    log.info("forward: %d of %d weights choose new rows", sum(refresh), len(refresh))
    _aot.trace_graph("grass_forward", gm)
    return gm


def finish_backward(
    gm: fx.GraphModule, plan: Plan, key: tuple[tuple[bool, ...], tuple[Action, ...], bool, bool], saved: Mapping[str, Any]
) -> fx.GraphModule:
    """A copy of a backward graph in which every anchor has become what this backward does with the gradient.

    Args:
        gm: the backward graph that `transform` returned.
        plan: the plan it was made for.
        key: for each projection, whether to choose new rows, which most actions do; for each, what to do;
            whether to clip all gradients by their common norm; and whether to average them over the ranks.
        saved: fake values of what the forward saves, by the names of the inputs here.
    """
    refresh, actions, clip, syncs = key
    gm = copy(gm)
    context = PassContext(
        plan=plan, disabled=plan.disabled, refresh=refresh, actions=actions, clip=clip, syncs=syncs, saved=saved
    )
    run((*BACKWARD[:-1], *plan.backward_passes, *BACKWARD[-1:]), gm, context)
    _aot.trace_graph("grass_backward", gm)
    return gm


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Operator counts that changed, as after minus before."""
    names = sorted({*before, *after})
    return {name: after.get(name, 0) - before.get(name, 0) for name in names if after.get(name, 0) != before.get(name, 0)}

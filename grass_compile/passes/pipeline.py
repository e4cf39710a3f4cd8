"""The passes, in order, and what flows between them.

::

    joint graph --normalize--> --detect--> sites --rewrite, score--> compact gradients --anchor--> one operator per site
                                                                                               |  min-cut partition
    forward graph, backward graph with anchors  <----------------------------------------------+
         |              |
         |              +--undo, for weights that choose new rows--> batch_matmuls --> lower_anchors --> schedule_steps --> verify
         |                                                           a backward for each way to use the gradients
         +--undo--> a forward that keeps all of their activations

One trace and one partition serve every step: copies of the two halves are finished when they are first needed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .. import _torch
from ..math.layout import Action, graph_state
from ..math.projection import SELECTORS
from .backward.batch_matmuls import batch_matmuls
from .backward.lower_anchors import lower_anchors
from .backward.schedule_steps import schedule_steps
from .backward.verify import verify
from .fx_utils import copy, op_counts, placeholders
from .joint import costs
from .joint.anchor import anchor
from .joint.detect import activations, detect
from .joint.interface import Interface, interface, is_nested
from .joint.normalize import normalize
from .joint.rewrite import rewrite, undo
from .joint.score import forget, score
from .records import Analysis, Projection, Refusal, Site, WeightInput

log = logging.getLogger(__name__)

PASSES = ("normalize", "detect", "rewrite", "score", "anchor", "batch_matmuls", "lower_anchors", "schedule_steps", "verify")
"""The names that ``options={"disable_passes": [...]}`` takes. Without detect, score, anchor, lower_anchors or schedule_steps
every weight stays dense; without rewrite the full gradient is formed and its rows are taken from it; without batch_matmuls every
weight has a product of its own; without verify nothing checks the result."""

ESSENTIAL = ("detect", "score", "anchor", "lower_anchors", "schedule_steps")


class PlanMismatch(Exception):
    """The joint graph holds other sites than the plan that it is compiled for; carries what was found."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__("the sites of this graph differ from the plan")
        self.analysis = analysis


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled from one joint graph; hashable.

    Attributes:
        weights: what the optimizer asked for, refusals known beforehand included.
        projections: the weights that are projected.
        hyper: for each projection, which of the tensors of hyper-parameters it reads.
        kernels: for each projection, the name under which `grass_compile.ops.operators` finds its step.
        leaders: for each projection, the position of the weight whose rows it takes; its own, but for those that share.
        disabled: names of passes to leave out.
        clipped: positions of the dense parameters whose gradients are clipped along with the compact ones, inside the graph;
            None if nothing is clipped there.
    """

    weights: tuple[WeightInput, ...]
    projections: tuple[Projection, ...]
    hyper: tuple[int, ...]
    kernels: tuple[str, ...]
    leaders: tuple[int, ...]
    disabled: tuple[str, ...] = ()
    clipped: tuple[int, ...] | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that follow those of the Dynamo graph: state tensors, leaves, hyper-parameters, the norm's leaf."""
        state = [f"grass_{name}_{p.position}" for p in self.projections for name in graph_state(p.config)]
        leaves = [f"grass_leaf_{p.position}" for p in self.projections]
        norm = () if self.clipped is None else ("grass_norm",)
        return (*state, *leaves, *(f"grass_hyper_{slot}" for slot in range(1 + max(self.hyper, default=-1))), *norm)


def find(
    gm: fx.GraphModule, *, weights: Sequence[WeightInput], num_fwd_outputs: int, disabled: Sequence[str] = ()
) -> tuple[tuple[Site, ...], Analysis]:
    """Run the analysing passes over a joint graph.

    Args:
        gm: the joint graph; `normalize` may simplify it.
        weights: what the optimizer wants projected.
        num_fwd_outputs: how many of the outputs belong to the forward.
        disabled: names of passes to leave out.

    Returns:
        The sites, and the same free of graph nodes.
    """
    missing = [name for name in ESSENTIAL if name in disabled]
    if missing:
        return (), Analysis((), tuple(Refusal(weight, f"pass {missing[0]!r} is disabled") for weight in weights))
    if "normalize" not in disabled and (dropped := normalize(gm)):
        log.info("normalize: dropped %d nodes", dropped)
    sites, refusals = detect(gm, weights=weights, num_fwd_outputs=num_fwd_outputs)
    log.info("detect: %d weights projected, %d dense", len(sites), len(refusals))
    for site in sites:
        log.debug("detect: %s: %s, rank %d: %s", site.weight.name, site.choice.axis, site.rank, site.choice.why)
    for refusal in refusals:
        log.debug("detect: %s stays dense: %s", refusal.weight.name, refusal.reason)
    numbers: dict[Any, int] = {}
    projections = [_projection(site, numbers.setdefault(activations(site), len(numbers))) for site in sites]
    return sites, Analysis(tuple(projections), refusals)


def look(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    weights: Sequence[WeightInput],
    disabled: Sequence[str] = (),
    num_fwd_outputs: int,
    **kwargs: object,
) -> Any:
    """In place of a partitioner: run the analysing passes and go no further.

    Raises:
        PlanMismatch: always, with what was found; but for graphs inside of the graph, which are partitioned as torch does.
    """
    if is_nested(joint_inputs):
        return _torch.min_cut_rematerialization_partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
    _, analysis = find(gm, weights=weights, num_fwd_outputs=num_fwd_outputs, disabled=disabled)
    raise PlanMismatch(analysis)


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
    plan: Plan,
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    num_fwd_outputs: int,
    **kwargs: object,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Rewrite and partition a joint graph.

    Args:
        gm: the joint graph.
        joint_inputs: its example inputs.
        plan: what this variant does.
        partition: torch's min-cut partitioner.
        num_fwd_outputs: how many of the outputs belong to the forward.
        **kwargs: for ``partition``.

    Returns:
        The forward graph, and the backward graph with anchors; `finish_forward` and `finish_backward` make runnable copies.

    Raises:
        PlanMismatch: the sites of this graph are not those of the plan.
    """
    if is_nested(joint_inputs):
        return partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
    _torch.trace_graph("grass_joint_before", gm)
    before = op_counts(gm)
    sites, analysis = find(gm, weights=plan.weights, num_fwd_outputs=num_fwd_outputs, disabled=plan.disabled)
    if analysis.projections != plan.projections:
        raise PlanMismatch(analysis)
    found = interface(gm, num_fwd_outputs)
    inputs, nodes = _inputs(found, plan), found.nodes
    leaders = {p.position: leader for p, leader in zip(plan.projections, plan.leaders, strict=True)}
    index = {p.position: inputs[leaders[p.position]][SELECTORS[p.config.projection]] for p in plan.projections}
    compact = rewrite(gm, sites=sites, index=index, from_slot="rewrite" in plan.disabled)
    log.info("rewrite: %d weight gradients made compact", len(sites))
    energy = score(gm, sites=sites, inputs=inputs, leaders=leaders)
    slots = {nodes[position]: slot for position, slot in found.slots.items()}
    clipped = [nodes[position] for position in plan.clipped or () if position in nodes]
    norm_leaf = None if plan.clipped is None else nodes[max(nodes)]
    anchor(gm, sites=sites, compact=compact, energy=energy, inputs=inputs, slots=slots, clipped=clipped, norm_leaf=norm_leaf)
    log.debug("anchor: operators %s", _difference(before, op_counts(gm)))
    _torch.trace_graph("grass_joint_after", gm)
    return partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)


def finish_forward(gm: fx.GraphModule, plan: Plan, refresh: tuple[bool, ...]) -> fx.GraphModule:
    """A copy of a forward graph that keeps what the backward needs.

    Args:
        gm: the forward graph that `transform` returned.
        plan: the plan it was made for.
        refresh: for each projection, whether its backward chooses new rows.
    """
    gm = copy(gm)
    undo(gm, _full(plan, refresh))
    forget(gm, {projection.position for projection, new in zip(plan.projections, refresh, strict=True) if not new})
    gm.recompile()
    log.info("forward: %d of %d weights choose new rows", sum(refresh), len(refresh))
    _torch.trace_graph("grass_forward", gm)
    return gm


def finish_backward(
    gm: fx.GraphModule, plan: Plan, key: tuple[tuple[bool, ...], tuple[Action, ...], bool], saved: Mapping[str, Any]
) -> fx.GraphModule:
    """A copy of a backward graph in which every anchor has become what this backward does with the gradient.

    Args:
        gm: the backward graph that `transform` returned.
        plan: the plan it was made for.
        key: for each projection, whether to choose new rows, which most actions do; for each, what to do;
            and whether to clip all gradients by their common norm.
        saved: fake values of what the forward saves, by the names of the inputs here.
    """
    refresh, actions, clip = key
    gm = copy(gm)
    changed = [node for node in placeholders(gm) if node.name in saved and not _alike(node.meta["val"], saved[node.name])]
    for node in changed:
        node.meta["val"] = saved[node.name]
    undo(gm, _full(plan, refresh), changed)
    if "batch_matmuls" not in plan.disabled and (fewer := batch_matmuls(gm)):
        log.info("batch_matmuls: %d products fewer", fewer)
    lower_anchors(gm, projections=plan.projections, kernels=plan.kernels, refresh=refresh, actions=actions, clip=clip)
    log.info("lower_anchors: %d weights, %s", len(actions), ", ".join(f"{actions.count(a)} {a}" for a in sorted(set(actions))))
    schedule_steps(gm)
    _torch.trace_graph("grass_backward", gm)
    if "verify" not in plan.disabled:
        verify(gm, names=[p.name for p, action in zip(plan.projections, actions, strict=True) if action == "step"])
    return gm


def _full(plan: Plan, refresh: tuple[bool, ...]) -> set[int]:
    """Positions of the weights whose full gradients are formed."""
    chosen = (projection for projection, new in zip(plan.projections, refresh, strict=True) if new)
    return {projection.position for projection in chosen if projection.config.scores == "exact"}


def _alike(one: Any, other: Any) -> bool:
    return not isinstance(one, Tensor) or (one.shape == other.shape and one.stride() == other.stride())


def _inputs(found: Interface, plan: Plan) -> dict[int, dict[str, fx.Node]]:
    """For each projected weight, its placeholder and those of its state, leaf and hyper-parameters, by name."""
    nodes = found.nodes
    first = 1 + max(nodes) - len(plan.input_names)
    added = {name: nodes[first + i] for i, name in enumerate(plan.input_names)}
    inputs = {}
    for projection, slot in zip(plan.projections, plan.hyper, strict=True):
        position = projection.position
        named = {name: added[f"grass_{name}_{position}"] for name in (*graph_state(projection.config), "leaf")}
        inputs[position] = {"weight": nodes[position], "hyper": added[f"grass_hyper_{slot}"], **named}
    return inputs


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Operator counts that changed, as after minus before."""
    names = sorted({*before, *after})
    return {name: after.get(name, 0) - before.get(name, 0) for name in names if after.get(name, 0) != before.get(name, 0)}

"""The passes, in order, and what flows between them.

::

    joint graph --normalize--> --detect--> sites --rewrite--> compact gradients --fuse--> new values in the slots
                                                                                             |  min-cut partition
    forward graph, backward graph  <--verify--  <--place--  (new values become writes)  <----+
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from .. import _torch
from ..runtime.step import graph_state
from . import costs
from .detect import detect, input_positions
from .fuse import fuse
from .fx_utils import op_counts, primals
from .normalize import normalize
from .place import place
from .records import Analysis, Projection, Refusal, Site, WeightInput
from .rewrite import rewrite
from .verify import verify

log = logging.getLogger(__name__)

PASSES = ("normalize", "detect", "rewrite", "fuse", "place", "verify")
"""The names that ``options={"disable_passes": [...]}`` takes. Without detect, fuse or place every weight stays dense; without
rewrite the full gradient is formed and its rows are taken from it; without verify nothing checks the result."""

ESSENTIAL = ("detect", "fuse", "place")


class PlanMismatch(Exception):
    """The joint graph holds other sites than the plan that it is compiled for; carries what was found."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__("the sites of this graph differ from the plan")
        self.analysis = analysis


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one compiled variant does; hashable, the variant's key.

    Attributes:
        weights: what the optimizer asked for, refusals known beforehand included.
        projections: the weights that are projected.
        refresh: for each projection, whether this step chooses new rows.
        hyper: for each projection, which of the tensors of hyper-parameters it reads.
        disabled: names of passes to leave out.
    """

    weights: tuple[WeightInput, ...]
    projections: tuple[Projection, ...]
    refresh: tuple[bool, ...]
    hyper: tuple[int, ...]
    disabled: tuple[str, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that follow the inputs of the Dynamo graph: state tensors, then hyper-parameters."""
        state = [f"grass_{name}_{p.position}" for p in self.projections for name in graph_state(p.config)]
        return (*state, *(f"grass_hyper_{slot}" for slot in range(1 + max(self.hyper, default=-1))))


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
    return sites, Analysis(tuple(_projection(site) for site in sites), refusals)


def _projection(site: Site) -> Projection:
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
    """Rewrite a joint graph for ``plan``, partition it, and finish the backward graph.

    Args:
        gm: the joint graph, traced with the plan's inputs behind those of the Dynamo graph.
        joint_inputs: handed to ``partition``.
        plan: what to do.
        partition: splits a joint graph into forward and backward.
        num_fwd_outputs: how many of the outputs belong to the forward.
        **kwargs: handed to ``partition``.

    Raises:
        PlanMismatch: the sites found are not those of the plan.
        GraphError: `verify` found a rule broken.
    """
    _torch.trace_graph("grass_joint_before", gm)
    before = op_counts(gm)
    sites, analysis = find(gm, weights=plan.weights, num_fwd_outputs=num_fwd_outputs, disabled=plan.disabled)
    if analysis.projections != plan.projections:
        raise PlanMismatch(analysis)
    weights, state = _inputs(gm, plan)
    regular = tuple(site for site, refresh in zip(sites, plan.refresh, strict=True) if not refresh)
    dense = "rewrite" in plan.disabled
    index = {position: names["index"] for position, names in state.items()}
    compact = rewrite(gm, sites=regular, index=index, from_slot=dense)
    log.info("rewrite: %d of %d weight gradients made compact", len(regular), len(sites))
    slots = {node: num_fwd_outputs + i for i, node in enumerate(primals(gm))}
    written = fuse(gm, sites=sites, compact=compact, state=state, weights=weights, slots=slots)
    log.info("fuse: %d optimizer steps inlined", len(sites))
    log.debug("fuse: operators %s", _difference(before, op_counts(gm)))
    _torch.trace_graph("grass_joint_after", gm)
    targets = {slot: primals(gm)[slot - num_fwd_outputs].name for slot in written}

    forward, backward = partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

    names = {site.weight.position: site.weight.name for site in sites}
    place(
        backward,
        written={slot - num_fwd_outputs: name for slot, name in targets.items()},
        names={slot - num_fwd_outputs: names[position] for slot, (position, _) in written.items()},
    )
    log.info("place: %d tensors written in the backward", len(written))
    _torch.trace_graph("grass_forward", forward)
    _torch.trace_graph("grass_backward", backward)
    if "verify" not in plan.disabled:
        verify(backward, weights={targets[slot]: names[p] for slot, (p, name) in written.items() if name == "weight"})
    return forward, backward


def _inputs(gm: fx.GraphModule, plan: Plan) -> tuple[dict[int, fx.Node], dict[int, dict[str, fx.Node]]]:
    """The placeholders of each projected weight, and of its state tensors and hyper-parameters by name."""
    nodes = dict(zip(input_positions(gm), primals(gm), strict=True))
    first = 1 + max(nodes) - len(plan.input_names)
    added = {name: nodes[first + i] for i, name in enumerate(plan.input_names)}
    weights = {p.position: nodes[p.position] for p in plan.projections}
    state = {}
    for projection, slot in zip(plan.projections, plan.hyper, strict=True):
        names = graph_state(projection.config)
        state[projection.position] = {name: added[f"grass_{name}_{projection.position}"] for name in names}
        state[projection.position]["hyper"] = added[f"grass_hyper_{slot}"]
    return weights, state


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Operator counts that changed, as after minus before."""
    names = sorted({*before, *after})
    return {name: after.get(name, 0) - before.get(name, 0) for name in names if after.get(name, 0) != before.get(name, 0)}

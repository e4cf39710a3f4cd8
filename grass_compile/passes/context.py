"""What passes are told, and what they hand on to those behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx

from ..math.layout import Action
from .joint.interface import Interface
from .records import Plan, Refusal, Site, WeightInput


@dataclasses.dataclass
class Findings:
    """What the passes over one joint graph have found and made so far; by the weights' positions.

    Attributes:
        sites: the weight gradients, by `detect`.
        refusals: the weights that stay dense, by `detect`.
        compact: the nodes of the compact gradients, by `rewrite`.
        energy: the nodes of what new rows are proposed by, by `score`.
    """

    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    compact: dict[int, fx.Node] = dataclasses.field(default_factory=dict)
    energy: dict[int, fx.Node] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What every pass is given beside its graph.

    Attributes:
        weights: what the optimizers want projected.
        num_fwd_outputs: how many outputs of a joint graph belong to the forward.
        disabled: names of passes to leave out.
        plan: what is compiled; None as long as a graph is only looked at.
        interface: the inputs of the joint graph; None for the halves.
        findings: what was found in the joint graph; passes add to it.
        refresh: of a half, for each projection, whether its backward chooses new rows.
        actions: of a backward, for each projection, what to do with its gradient.
        clip: of a backward, whether to clip all gradients by their common norm.
        syncs: of a backward, whether gradients are averaged over the ranks.
        saved: of a backward, fake values of what its forward saves, by the names of the inputs.
    """

    weights: tuple[WeightInput, ...] = ()
    num_fwd_outputs: int = 0
    disabled: tuple[str, ...] = ()
    plan: Plan | None = None
    interface: Interface | None = None
    findings: Findings = dataclasses.field(default_factory=Findings)
    refresh: tuple[bool, ...] = ()
    actions: tuple[Action, ...] = ()
    clip: bool = False
    syncs: bool = True
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def planned(self) -> Plan:
        """The plan, where there has to be one."""
        assert self.plan is not None
        return self.plan

    @property
    def inputs(self) -> dict[int, dict[str, fx.Node]]:
        """For each projected weight, its placeholder (``read``) and those of its state, leaf and hyper-parameters, by name;
        ``weight`` is what its step writes, the part that this rank owns if it is sharded."""
        plan, nodes = self.planned, self.nodes
        first = 1 + max(nodes) - len(plan.input_names)
        added = {name: nodes[first + number] for number, name in enumerate(plan.input_names)}
        inputs = {}
        for projection, slot in zip(plan.projections, plan.hyper, strict=True):
            position = projection.position
            named = {name: added[f"grass_{name}_{position}"] for name in (*plan.state_names(projection), "leaf")}
            read, hyper = nodes[position], added[f"grass_hyper_{slot}"]
            inputs[position] = {"read": read, "weight": named.pop("shard", read), "hyper": hyper, **named}
        return inputs

    @property
    def nodes(self) -> Mapping[int, fx.Node]:
        """The placeholders of a joint graph by the positions of the inputs that they are."""
        assert self.interface is not None
        return self.interface.nodes

    @property
    def leaders(self) -> dict[int, int]:
        """For each projected weight, the position of the one whose rows it takes."""
        plan = self.planned
        return {p.position: leader for p, leader in zip(plan.projections, plan.leaders, strict=True)}

    @property
    def full(self) -> set[int]:
        """Positions of the weights whose full gradients are formed in this half."""
        chosen = (p for p, new in zip(self.planned.projections, self.refresh, strict=True) if new)
        return {p.position for p in chosen if p.config.scores == "exact"}

"""From what optimizers want of the parameters of a call to what is compiled for it (`Plan`), and to the inputs that it takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autograd, _dynamo
from ..config import BackendOptions
from ..distributed.layout import is_sharded, local_part
from ..errors import ConfigError, GraphError
from ..math.layout import SHARED_HYPER
from ..passes.joint.detect import OWNED_BY_PARTS
from ..passes.records import Analysis, Plan, Projection, WeightInput
from ..runtime import registry
from ..runtime.call import manager_of
from ..runtime.compact import Assigned, fits, initial_state, leaf_like, likely
from ..runtime.parameter import ProjectedParameter
from . import kernels

Numbers = tuple[Tensor, ProjectedParameter, bool]
"""A tensor of hyper-parameters, a record that it belongs to, and whether it is that of a refresh."""


def make_plan(
    options: BackendOptions,
    weights: tuple[WeightInput, ...],
    analysis: Analysis,
    records: Mapping[int, ProjectedParameter],
    clipped: tuple[int, ...] | None,
) -> Plan | None:
    """The plan for a call, or None if nothing is projected. Assigns compact state to weights that have none.

    Args:
        options: the backend's.
        weights: what the optimizers want.
        analysis: what is possible of that.
        records: by position.
        clipped: see `Plan`.

    Raises:
        GraphError: ``strict``, and a weight that should be projected is not.
        ConfigError: a weight is to be projected along the dimension that is sharded.
    """
    if options.strict:
        _check_strict(analysis)
    check_sharded(analysis)
    if not analysis.projections:
        return None
    for projection in analysis.projections:
        assigned = Assigned(projection.axis, projection.dim, projection.rank, projection.why)
        records[projection.position].assign(assigned, functools.partial(kernels.run, options))
    held = [records[projection.position] for projection in analysis.projections]
    leaders = _leaders(analysis.projections, held)  # first: when a weight refreshes depends on whom it follows
    if clipped is not None:
        clipped = tuple(position for position in clipped if position not in {p.position for p in analysis.projections})
    return Plan(
        weights=weights,
        projections=analysis.projections,
        hyper=_numbered([record.hyper_key(record.renewed) for record in held]),
        kernels=tuple(kernels.named(options, p.config, p.dim) for p in analysis.projections),
        leaders=leaders,
        disabled=options.disable_passes,
        clipped=clipped,
        joint_passes=options.joint_passes,
        backward_passes=options.backward_passes,
    )


def guessed(
    options: BackendOptions,
    weights: tuple[WeightInput, ...],
    records: Mapping[int, ProjectedParameter],
    shapes: Mapping[int, Sequence[Any]],
    clipped: tuple[int, ...] | None,
) -> Plan:
    """What a plan will most likely be, before the graph was looked at: every weight is one of an ``nn.Linear``.

    If a graph that is traced with the inputs of this plan turns out to need these (`Plan.takes_inputs_of`), it need not be traced
    again.

    Args:
        options: the backend's.
        weights: what the optimizers want.
        records: by position.
        shapes: of the weights, by position.
        clipped: see `Plan`.
    """
    projections, keys = [], []
    for weight in weights:
        record, shape = records[weight.position], shapes[weight.position]
        if weight.refusal is not None or not all(isinstance(size, int) for size in shape) or not fits(weight.config, shape):
            continue
        assigned = record.assigned or likely(weight.config, (shape[0], shape[1]))
        where = weight.config, assigned.axis, assigned.dim, assigned.rank
        projections.append(Projection(weight.name, weight.position, *where, (shape[0], shape[1]), "", 0))
        keys.append(record.hyper_key(record.renewed) if record.assigned is not None else record.group_key())
    if clipped is not None:
        clipped = tuple(position for position in clipped if position not in {p.position for p in projections})
    planned = nothing_planned(options, weights)
    if not projections:
        return planned
    return dataclasses.replace(planned, projections=tuple(projections), hyper=_numbered(keys), clipped=clipped)


def nothing_planned(options: BackendOptions, weights: tuple[WeightInput, ...]) -> Plan:
    """A plan that takes no inputs, for a graph that is only looked at."""
    return Plan(weights, disabled=options.disable_passes, joint_passes=options.joint_passes)


def part_read(weight: WeightInput, tensor: Tensor) -> Tensor:
    """What a compiled region reads of a weight: the part that this rank owns under tensor parallelism, or else itself."""
    return local_part(tensor).detach().requires_grad_(tensor.requires_grad) if reads_part(weight, tensor) else tensor


def meshes_of(plan: Plan, inputs: Sequence[Any]) -> dict[Any, Tensor]:
    """The meshes of the weights of which regions read parts, and for each a ``DTensor`` on it: an input from which the graph
    takes the mesh, so that AOTAutograd knows it."""
    found: dict[Any, Tensor] = {}
    for weight in plan.weights:
        if reads_part(weight, tensor := inputs[weight.position]):
            found.setdefault(tensor.device_mesh, tensor.detach())
    return found


def reads_part(weight: WeightInput, tensor: Tensor) -> bool:
    """Whether a compiled region reads only the part of a weight that this rank owns."""
    return weight.config.layout is not None and is_sharded(tensor)


def clipped_inside(parameters: Mapping[int, Tensor], records: Mapping[int, ProjectedParameter]) -> tuple[int, ...] | None:
    """Positions of the parameters whose gradients can be clipped inside a graph.

    Args:
        parameters: those that the graph takes, by position.
        records: of the weights that may be projected, by position.

    Returns:
        The positions of all parameters that the optimizer trains; None if it clips nothing, never moves weights inside a
        backward, trains parameters that this graph does not take, or somebody waits for the gradient of one.
    """
    manager = next((manager_of(record) for record in records.values()), None)
    if manager is None or manager.max_norm is None or manager.watch.mode is False:
        return None
    if any(record.layout is not None for record in records.values()):  # others average the dense gradients, later
        return None
    if any(map(is_sharded, (*parameters.values(), *manager.records))):
        return None
    positions = {id(tensor): position for position, tensor in parameters.items() if tensor.requires_grad}
    trained = [parameter for parameter in manager.records if parameter.requires_grad]
    if not all(id(parameter) in positions for parameter in trained) or any(_autograd.have_hooks(trained)):
        return None
    if any(record.owner is not manager for record in records.values()):
        return None
    return tuple(sorted(positions[id(parameter)] for parameter in trained))


def settled(weights: tuple[WeightInput, ...], analysis: Analysis) -> tuple[tuple[WeightInput, ...], Analysis]:
    """The requests as they stand once every axis is settled (which is how the optimizers ask from now on), and the analysis of
    these."""
    axes = {projection.position: projection.axis for projection in analysis.projections}
    asked = tuple(
        dataclasses.replace(weight, config=dataclasses.replace(weight.config, axis=axes[weight.position]))
        if weight.position in axes
        else weight
        for weight in weights
    )
    configs = {weight.position: weight.config for weight in asked}
    projections = tuple(dataclasses.replace(p, config=configs[p.position]) for p in analysis.projections)
    return asked, dataclasses.replace(analysis, projections=projections)


def numbers_of(plan: Plan, records: Sequence[ProjectedParameter]) -> list[Numbers]:
    """One tensor of hyper-parameters per distinct group, in the order of the plan's numbers."""
    found: dict[int, Numbers] = {}
    for slot, record in zip(plan.hyper, records, strict=True):
        if slot not in found:
            found[slot] = manager_of(record).hyper(record, record.renewed), record, record.renewed
    return list(found.values())


def norm_leaf(plan: Plan, records: Sequence[ProjectedParameter]) -> list[Tensor]:
    """The input that brings back the common norm, if the plan clips."""
    return [] if plan.clipped is None else [manager_of(records[0]).norm_leaf(records[0].parameter)]


def is_static(name: str) -> bool:
    """Whether an input of ours keeps its address from call to call. Numbers do not, nor does what a refresh replaces: rows come
    from a scratch copy in one call and from the state in the next, and a basis is a new tensor each time."""
    return not name.startswith(("grass_hyper_", "grass_due_", "grass_index_", "grass_basis_", "grass_key_"))


def fake_inputs(mode: Any, example_inputs: Sequence[Any], plan: Plan) -> list[Tensor]:
    """Fake tensors of static shape for the inputs that `Plan.input_names` names."""
    state: list[Tensor] = []
    leaves: list[Tensor] = []
    hyper: dict[int, Tensor] = {}
    with mode:
        for projection, slot in zip(plan.projections, plan.hyper, strict=True):
            weight = example_inputs[projection.position]
            config, layout = projection.config, projection.config.layout
            owned = weight
            if layout is not None and layout.shape is not None and layout.part_of_gradient is not None:
                owned = torch.empty(layout.shape, dtype=layout.dtype, device=weight.device)
                weight = owned.new_empty(layout.part_of_gradient)
            wide = torch.promote_types(weight.dtype, torch.float32)
            state += _fake_state(projection, weight, owned, wide)
            leaves.append(leaf_like(weight, Assigned(projection.axis, projection.dim, projection.rank)).requires_grad_())
            if slot not in hyper:
                count = len(config.rule.hyper_names) + len(SHARED_HYPER)
                hyper[slot] = torch.empty(count, dtype=wide, device=weight.device)
        norm = [] if plan.clipped is None else [torch.zeros_like(leaves[0][0, 0]).requires_grad_()]
    return [*state, *leaves, *hyper.values(), *norm]


def _fake_state(projection: Projection, weight: Tensor, owned: Tensor, wide: torch.dtype) -> list[Tensor]:
    """The state of a weight of the gradient's shape, of which this rank owns a part."""
    config, assigned = projection.config, Assigned(projection.axis, projection.dim, projection.rank)
    how = config.on_refresh, config.rule, config.state_dtype, config.checked, config.projection
    made = initial_state(weight, assigned, *how)
    if config.projection == "grass":
        made["proposed"] = made["index"]
    made["square_sum"] = torch.empty(1, dtype=wide, device=weight.device)
    made["due"] = torch.empty((), dtype=torch.bool, device="cpu")
    made["noise"] = torch.empty(weight.shape[projection.dim], dtype=wide, device=weight.device)
    made["shard"] = owned
    return [made[name] for name in Plan.state_names(projection)]


def _leaders(projections: Sequence[Projection], records: Sequence[ProjectedParameter]) -> tuple[int, ...]:
    """For each projection the position of the weight whose columns it takes: with ``share_index``, the first of those that read
    the same activations and have been trained alike. Brings the others' columns into line."""
    first: dict[Any, tuple[int, ProjectedParameter]] = {}
    leaders = []
    for projection, record in zip(projections, records, strict=True):
        leader = projection.position
        if record.options.share_index and projection.reads is not None:
            key = projection.reads, projection.rank, id(record.owner), record.options, record.state["updates"]
            position, lead = first.get(key, (leader, record))
            if record.follow(lead):
                first[key], leader = (position, lead), position
        leaders.append(leader)
    return tuple(leaders)


def _numbered(keys: Sequence[Any]) -> tuple[int, ...]:
    """Equal keys get equal numbers, in the order of first appearance."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def _check_strict(analysis: Analysis) -> None:
    """Raise if a weight stays dense for another reason than that the user excluded it."""
    dense = [refusal for refusal in analysis.refusals if "exclude=" not in refusal.reason]
    if dense:
        lines = "\n".join(f"  {refusal.weight.name}: {refusal.reason}" for refusal in dense)
        raise GraphError(f"strict: {len(dense)} weights stay dense. Exclude them by name or drop options['strict'].\n{lines}")


def check_sharded(analysis: Analysis) -> None:
    """Refuse to project a weight along the dimension that is sharded.

    Raises:
        ConfigError: naming it, and what goes.
    """
    for refusal in analysis.refusals:
        if refusal.reason.startswith(OWNED_BY_PARTS):
            raise ConfigError(
                f"{refusal.weight.name}: {refusal.reason}. Columns go with a weight that is sharded along dimension 0 "
                "(fully_shard by default, ColwiseParallel), rows with one along dimension 1 (fully_shard(..., "
                "shard_placement_fn=lambda parameter: Shard(1)), RowwiseParallel). Where both shard it, fully_shard's dimension "
                "goes. axis='auto' takes what goes."
            )


def parameters_of(captured: _dynamo.Captured, args: Sequence[Any]) -> dict[int, Tensor]:
    """The parameters among the inputs of a call, by position."""
    return {position: args[position] for position, _ in captured.parameters}


def others(parameters: Mapping[int, Tensor], plan: Plan) -> list[Tensor]:
    """The parameters that a plan does not project and whose gradients its backward may bring."""
    projected = {projection.position for projection in plan.projections}
    return [tensor for at, tensor in parameters.items() if at not in projected and registry.lookup(tensor) is not None]

"""The backend: Dynamo graph -> plan -> AOTAutograd and a compiler -> a callable. The only wiring between the passes,
which see no tensors, and the runtime, which sees no graphs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import _torch
from ..config import BackendOptions
from ..errors import ConfigError, GraphError, GrassError, GrassWarning
from ..math.layout import SHARED_HYPER, graph_state
from ..optim import adoption
from ..optim.rules import AdamWRule
from ..passes import pipeline
from ..passes.pipeline import PASSES, PlanMismatch
from ..passes.records import Analysis, Plan, Projection, WeightInput
from ..runtime import parameter as registry
from ..runtime.call import Call, expected, in_graph
from ..runtime.compact import Assigned, initial_state, leaf_like
from ..runtime.parameter import ProjectedParameter, refusal
from . import kernels

log = logging.getLogger(__name__)


def grass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="grass")``; found through the ``torch_dynamo_backends`` entry point.

    Args:
        gm: a Dynamo graph.
        example_inputs: the inputs that it was traced with.
        options: see `grass_compile.config.BackendOptions`.
        mode: as for Inductor.

    Returns:
        A callable with the graph's signature. A `GrassError` is raised when it is called rather than here, because Dynamo
        would wrap it into an error of its own.
    """
    try:
        region = Region(gm, example_inputs, BackendOptions.parse(options, mode, PASSES))
    except GrassError as error:
        return _raising(error)
    return _torch.outside_dynamo(region)


def _raising(error: GrassError) -> Callable[..., Any]:
    def raise_error(*args: Any) -> Any:
        raise error

    return raise_error


@dataclasses.dataclass(frozen=True)
class Variant:
    """A compiled function, and its halves, which are told at each call what they have to do."""

    call: Callable[..., Any]
    pair: _torch.CompiledPair | None


class Region:
    """One Dynamo graph and what is compiled from it.

    The graph may serve many sets of parameters (blocks compiled one by one, two models of a class), so each call looks up what
    the optimizers want of the parameters that came in, and picks or compiles the variant for that.
    """

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions, compile_now: bool = True
    ) -> None:
        self.options = options
        self.captured, real = _torch.capture(gm, example_inputs)
        self.trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in real)
        self._analyses: dict[tuple[WeightInput, ...], tuple[tuple[WeightInput, ...], Analysis]] = {}
        self._variants: dict[Plan | None, Variant] = {}
        self._warned = False
        if compile_now:
            self._compile_first(real)

    def _compile_first(self, parameters: Sequence[Tensor]) -> None:
        """Trace for the first call now, while Dynamo still collects guards on symbolic shapes."""
        try:
            if not self.trains:
                self.variant(None)
                return
            weights, records = self.ask(parameters)
            by_position = dict(zip((position for position, _ in self.captured.parameters), parameters, strict=True))
            plan = self.plan(weights, records, self._clipped(by_position, records))
            self.variant(plan, [records[p.position] for p in plan.projections] if plan is not None else ())
        except GrassError as error:
            log.debug("compilation failed and is repeated at the call, to raise outside of Dynamo: %s", error)

    # ------------------------------------------------------------------------------------------------------- a call

    def __call__(self, *args: Any) -> Any:
        if not self.trains:
            return self.variant(None).call(*args)
        weights, records = self.ask([args[position] for position, _ in self.captured.parameters])
        plan = self.plan(weights, records, self._clipped(args, records))
        if plan is None:
            return self.variant(None).call(*args)
        held = [records[projection.position] for projection in plan.projections]
        refresh = tuple(record.due for record in held)
        state = [tensor for record, new in zip(held, refresh, strict=True) for tensor in record.inputs(new)]
        numbers = _numbers(plan, held)
        inputs = (
            *args,
            *state,
            *(record.leaf for record in held),
            *(tensor for tensor, _, _ in numbers),
            *_norm_leaf(plan, held),
        )
        since = _torch.sequence_number()
        variant = self.variant(plan, held)
        assert variant.pair is not None
        variant.pair.forward.key = in_graph(held, refresh)
        results = variant.call(*inputs)
        returned = results if isinstance(results, (list, tuple)) else (results,)
        node = _torch.backward_node((*returned, *args), since)  # a region may do nothing but write to its inputs
        if node is not None:
            call = Call(held, refresh, variant.pair.backward, plan.clipped is not None, numbers)
            node.register_prehook(call.before_backward)
            node.register_hook(call.after_backward)
        return results

    def ask(self, parameters: Sequence[Tensor]) -> tuple[tuple[WeightInput, ...], dict[int, ProjectedParameter]]:
        """What the optimizers want of the parameters that came in.

        Args:
            parameters: in the order of the graph's inputs.

        Returns:
            The weights that a grass optimizer wants projected, and their records by position.

        Raises:
            ConfigError: the model runs inside a wrapper that would be silently wrong.
        """
        weights, records, held, free = [], {}, False, []
        for (position, name), parameter in zip(self.captured.parameters, parameters, strict=True):
            record = registry.lookup(parameter)
            held = held or record is not None
            if parameter.dim() != 2 or not parameter.requires_grad:
                continue
            if record is None:
                free.append((name, position, parameter))
            elif record.options.rank is not None:
                record.name = record.name or name
                weights.append(WeightInput(record.name, position, record.config(), record.refusal(name)))
                records[position] = record
        if self.options.project is not None:
            self._wish(free)
            held = True
        if not held and any(isinstance(parameter, torch.nn.Parameter) for parameter in parameters):
            self._warn_unheld()
        elif weights and _torch.inside_ddp():
            raise ConfigError(
                f"{weights[0].name}: the model runs inside DistributedDataParallel, which is not supported yet: the ranks would "
                "drift apart without a word. Train on one device, or use another backend."
            )
        return tuple(weights), records

    def _wish(self, free: Sequence[tuple[str, int, Tensor]]) -> None:
        """Note which weights could be projected once a known optimizer turns out to hold them."""
        options = self.options.project
        assert options is not None and options.rank is not None
        config = options.site(options.axis, False, AdamWRule())
        asked = tuple(WeightInput(name, at, config, refusal(name, tensor, options)) for name, at, tensor in free)
        found = {p.position: p for p in self.analyse(asked)[1].projections} if asked else {}
        for name, position, parameter in free:
            if position in found:
                projection = found[position]
                assigned = Assigned(projection.axis, projection.dim, projection.rank, projection.why)
                adoption.wish(parameter, adoption.Wish(name, options, assigned, functools.partial(kernels.run, self.options)))

    def _warn_unheld(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "no grass optimizer holds the parameters of this model, so it is compiled like Inductor does. Write: "
                "opt = grass_compile.AdamW(model.named_parameters(), lr=..., rank=...) before the first backward, or keep your "
                "torch.optim.AdamW, Adam or SGD and compile with options={'rank': ...}.",
                GrassWarning,
                stacklevel=2,
            )

    # ---------------------------------------------------------------------------------------------------- the plans

    def _clipped(
        self, args: Sequence[Any] | Mapping[int, Any], records: Mapping[int, ProjectedParameter]
    ) -> tuple[int, ...] | None:
        """Positions of the parameters whose gradients can be clipped inside this graph, along with those of all others that
        their optimizer trains; None if it clips nothing, or trains any that this graph does not."""
        holder = next((record.holder for record in records.values()), None)
        if holder is None or holder.max_norm is None or not holder.fused:
            return None
        mine = {id(args[at]): at for at, _ in self.captured.parameters if args[at].requires_grad}
        trained = [parameter for parameter in holder.records if parameter.requires_grad]
        covers = all(id(parameter) in mine for parameter in trained) and all(r.holder is holder for r in records.values())
        return tuple(sorted(mine[id(parameter)] for parameter in trained)) if covers else None

    def plan(
        self,
        weights: tuple[WeightInput, ...],
        records: Mapping[int, ProjectedParameter],
        clipped: tuple[int, ...] | None = None,
    ) -> Plan | None:
        """The plan for a call, or None if nothing is projected. Assigns compact state to weights that have none.

        Args:
            weights: what the optimizers want.
            records: by position.
            clipped: see `Plan`.

        Raises:
            GraphError: ``strict``, and a weight that should be projected is not.
        """
        if not weights:
            return None
        weights, analysis = self.analyse(weights)
        if self.options.strict:
            _check_strict(analysis)
        if not analysis.projections:
            return None
        for projection in analysis.projections:
            assigned = Assigned(projection.axis, projection.dim, projection.rank, projection.why)
            records[projection.position].assign(assigned, functools.partial(kernels.run, self.options))
        held = [records[projection.position] for projection in analysis.projections]
        leaders = _leaders(analysis.projections, held)  # first: when a weight refreshes depends on whom it follows
        if clipped is not None:
            clipped = tuple(position for position in clipped if position not in {p.position for p in analysis.projections})
        return Plan(
            weights=weights,
            projections=analysis.projections,
            hyper=_numbered([record.hyper_key(record.renewed) for record in held]),
            kernels=tuple(kernels.named(self.options, p.config, p.dim) for p in analysis.projections),
            leaders=leaders,
            disabled=self.options.disable_passes,
            clipped=clipped,
            joint_passes=self.options.joint_passes,
            backward_passes=self.options.backward_passes,
        )

    def analyse(self, weights: tuple[WeightInput, ...]) -> tuple[tuple[WeightInput, ...], Analysis]:
        """Which of ``weights`` can be projected in this graph; traced once per set of requests.

        Returns:
            The requests as they stand once every axis is settled (which is how the optimizers ask from now on), and the
            analysis of these.
        """
        if weights not in self._analyses:
            found = self._trace(weights)
            settled = tuple(_settled(weight, found) for weight in weights)
            self._analyses[weights] = self._analyses[settled] = settled, _renamed(found, settled)
        return self._analyses[weights]

    def _trace(self, weights: tuple[WeightInput, ...]) -> Analysis:
        options = self.options
        only_look = functools.partial(
            pipeline.look, weights=weights, disabled=options.disable_passes, joint_passes=options.joint_passes
        )
        gm = _torch.with_inputs(self.captured, (), ())
        try:
            self._compile(gm, self.captured.example_inputs, only_look)
        except PlanMismatch as found:
            return found.analysis
        return Analysis((), ())  # the graph needs no backward

    # ------------------------------------------------------------------------------------------------- the variants

    def variant(self, plan: Plan | None, held: Sequence[ProjectedParameter] = ()) -> Variant:
        """The compiled variant for ``plan``; None stands for the graph as any compiler would have it."""
        if plan not in self._variants:
            self._variants[plan] = self._compile_plain() if plan is None else self._compile_plan(plan, held)
        return self._variants[plan]

    def _compile_plain(self) -> Variant:
        gm = _torch.with_inputs(self.captured, (), ())
        return Variant(self._compile(gm, self.captured.example_inputs, None), None)

    def _compile_plan(self, plan: Plan, held: Sequence[ProjectedParameter]) -> Variant:
        log.info("compiling: %d weights projected", len(plan.projections))
        names = plan.input_names
        static = [not name.startswith(("grass_hyper_", "grass_due_")) for name in names]
        gm = _torch.with_inputs(self.captured, names, static)
        inputs = (*self.captured.example_inputs, *_fake_state(_torch.fake_mode(self.captured), self.captured, plan))
        partition = functools.partial(pipeline.transform, plan=plan, partition=_torch.min_cut_rematerialization_partition)
        pair = self._pair(plan, held)
        try:
            return Variant(self._compile(gm, inputs, partition, pair), pair)
        except PlanMismatch as found:
            raise GraphError(
                f"the graph of {plan.projections[0].name} changed between two traces: {found.analysis}; please report this."
            ) from found

    def _pair(self, plan: Plan, held: Sequence[ProjectedParameter]) -> _torch.CompiledPair:
        """The halves of a plan; the next call needs what is due now, those that follow a regular step."""
        due, never = in_graph(held, [record.due for record in held]), in_graph(held, [False] * len(held))
        refreshes = (due, never) if due != never else (never,)
        forward = _torch.LazyGraph(lambda gm, key: pipeline.finish_forward(gm, plan, key), refreshes)
        backward = _torch.LazyGraph(
            lambda gm, key: pipeline.finish_backward(gm, plan, key, pair.saved(key[0])),
            tuple(expected(held, refresh, plan.clipped is not None) for refresh in refreshes),
        )
        pair = _torch.CompiledPair(forward, backward)
        return pair

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], partition: Any, pair: _torch.CompiledPair | None = None
    ) -> Callable[..., Any]:
        return _torch.compile_graph(
            self.captured,
            gm,
            inputs,
            compiler=self.options.compiler,
            mode=self.options.mode,
            patches=dict(self.options.inductor),
            partition=partition,
            key=kernels.source_hash() + self.options.passes_key,
            pair=pair,
        )


def _settled(weight: WeightInput, analysis: Analysis) -> WeightInput:
    """The request for a weight once its axis is known."""
    for projection in analysis.projections:
        if projection.position == weight.position:
            return dataclasses.replace(weight, config=dataclasses.replace(weight.config, axis=projection.axis))
    return weight


def _renamed(analysis: Analysis, weights: tuple[WeightInput, ...]) -> Analysis:
    """The same analysis with the configurations of ``weights``."""
    configs = {weight.position: weight.config for weight in weights}
    projections = tuple(dataclasses.replace(p, config=configs[p.position]) for p in analysis.projections)
    return dataclasses.replace(analysis, projections=projections)


def _leaders(projections: Sequence[Projection], records: Sequence[ProjectedParameter]) -> tuple[int, ...]:
    """For each projection the position of the weight whose columns it takes: with ``share_index``, the first of those that read
    the same activations and have been trained alike. Brings the others' columns into line."""
    first: dict[Any, tuple[int, ProjectedParameter]] = {}
    leaders = []
    for projection, record in zip(projections, records, strict=True):
        leader = projection.position
        if record.options.share_index and projection.reads is not None:
            key = projection.reads, projection.rank, id(record.holder), record.options, record.state["updates"]
            position, lead = first.get(key, (leader, record))
            if record.follow(lead):
                first[key], leader = (position, lead), position
        leaders.append(leader)
    return tuple(leaders)


def _numbered(keys: Sequence[Any]) -> tuple[int, ...]:
    """Equal keys get equal numbers, in the order of first appearance."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def _numbers(plan: Plan, records: Sequence[ProjectedParameter]) -> list[tuple[Tensor, ProjectedParameter, bool]]:
    """One tensor of hyper-parameters per distinct group, in the order of the plan's numbers; with a record that it is of."""
    found: dict[int, tuple[Tensor, ProjectedParameter, bool]] = {}
    for slot, record in zip(plan.hyper, records, strict=True):
        if slot not in found:
            assert record.holder is not None
            found[slot] = record.holder.hyper(record, record.renewed), record, record.renewed
    return list(found.values())


def _norm_leaf(plan: Plan, records: Sequence[ProjectedParameter]) -> list[Tensor]:
    holder = records[0].holder
    return [] if plan.clipped is None or holder is None else [holder.norm_leaf(records[0].parameter)]


def _fake_state(mode: Any, captured: _torch.Captured, plan: Plan) -> list[Tensor]:
    """Fake tensors of static shape for the inputs that `Plan.input_names` names."""
    state: list[Tensor] = []
    leaves: list[Tensor] = []
    hyper: dict[int, Tensor] = {}
    with mode:
        for projection, slot in zip(plan.projections, plan.hyper, strict=True):
            weight = captured.example_inputs[projection.position]
            assigned = Assigned(projection.axis, projection.dim, projection.rank)
            config = projection.config
            how = config.on_refresh, config.rule, config.state_dtype, config.checked, config.projection
            made = initial_state(weight, assigned, *how)
            if config.projection == "grass":
                made["proposed"] = made["index"]
            made["due"] = torch.empty((), dtype=torch.bool, device="cpu")
            made["noise"] = torch.empty(weight.shape[projection.dim], dtype=_state_dtype(weight), device=weight.device)
            state += [made[name] for name in graph_state(config)]
            leaves.append(leaf_like(weight, assigned).requires_grad_())
            if slot not in hyper:
                count = len(config.rule.hyper_names) + len(SHARED_HYPER)
                hyper[slot] = torch.empty(count, dtype=_state_dtype(weight), device=weight.device)
        norm = (
            [] if plan.clipped is None else [torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device, requires_grad=True)]
        )
    return [*state, *leaves, *hyper.values(), *norm]


def _state_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _check_strict(analysis: Analysis) -> None:
    """Raise if a weight stays dense for another reason than that the user excluded it."""
    dense = [refusal for refusal in analysis.refusals if "exclude=" not in refusal.reason]
    if dense:
        lines = "\n".join(f"  {refusal.weight.name}: {refusal.reason}" for refusal in dense)
        raise GraphError(f"strict: {len(dense)} weights stay dense. Exclude them by name or drop options['strict'].\n{lines}")

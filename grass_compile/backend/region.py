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

from .. import _autograd, _dynamo
from ..config import BackendOptions
from ..distributed import ddp, fsdp, tensor_parallel
from ..distributed.layout import is_sharded, why_left_out
from ..errors import GrassError, GrassWarning
from ..optim import adoption
from ..optim.rules import AdamWRule
from ..passes.pipeline import PASSES
from ..passes.records import Analysis, Plan, WeightInput
from ..runtime import registry
from ..runtime.call import Call, in_graph, manager_of
from ..runtime.compact import Assigned
from ..runtime.delivery import leaf_of, twin_of
from ..runtime.parameter import ProjectedParameter, refusal
from . import kernels
from .lazy import LazyGraph, Run
from .plan import check_sharded, clipped_inside, meshes_of, norm_leaf, numbers_of, others, parameters_of, part_read, reads_part
from .variants import Variants, records_of

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
    _dynamo.guard_requires_grad()
    try:
        region = Region(gm, example_inputs, BackendOptions.parse(options, mode, PASSES))
    except GrassError as error:
        return _raising(error)
    return _dynamo.outside_dynamo(region)


def _raising(error: GrassError) -> Callable[..., Any]:
    def raise_error(*args: Any) -> Any:
        raise error

    return raise_error


class Region:
    """One Dynamo graph and what is compiled from it.

    The graph may serve many sets of parameters (blocks compiled one by one, two models of a class), so each call looks up what
    the optimizers want of the parameters that came in, and picks or compiles the variant for that.
    """

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions, compile_now: bool = True
    ) -> None:
        self.options = options
        self.captured, real = _dynamo.capture(gm, example_inputs)
        self.trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in real)
        self.variants = Variants(self.captured, options)
        self._warned = False
        if compile_now and _dynamo.are_known(real):
            self._compile_first(real)

    def _compile_first(self, parameters: Sequence[Tensor]) -> None:
        """Trace for the first call now, while Dynamo still collects guards on symbolic shapes."""
        try:
            if not self.trains:
                self.variants.of(None)
                return
            positions = [position for position, _ in self.captured.parameters]
            plan, records = self.plan(dict(zip(positions, parameters, strict=True)))
            self.variants.of(plan, records_of(plan, records) if plan is not None else ())
        except GrassError as error:
            log.debug("compilation failed and is repeated at the call, to raise outside of Dynamo: %s", error)

    # ------------------------------------------------------------------------------------------------------- a call

    def __call__(self, *args: Any) -> Any:
        if not self.trains:
            return self.variants.of(None).call(*args)
        parameters = parameters_of(self.captured, args)
        plan, records = self.plan(parameters)
        if plan is None:
            return self.variants.of(None).call(*args)
        held = records_of(plan, records)
        if (module := ddp.active()) is not None:
            ddp.take_out(module, [record.parameter for record in held])
        refresh = tuple(record.due for record in held)
        variant = self.variants.of(plan, held)
        assert variant.pair is not None
        state = [tensor for record, new in zip(held, refresh, strict=True) for tensor in record.inputs(new)]
        numbers = numbers_of(plan, held)
        given = _without_gradients(args, plan)
        hyper = [tensor for tensor, _, _ in numbers]
        written = (*(given[projection.position] for projection in plan.projections), *state, *hyper)
        since = _autograd.sequence_number()
        with variant.pair.forward.running(in_graph(held, refresh)), _autograd.kept_in_place(written):
            rest = (*norm_leaf(plan, held), *meshes_of(plan, args).values())
            results = variant.call(*given, *state, *map(leaf_of, held), *hyper, *rest)
        returned = results if isinstance(results, (list, tuple)) else (results,)
        node = _autograd.backward_node((*returned, *args), since)  # a region may do nothing but write to its inputs
        if node is not None:
            backward = variant.pair.backward
            call = Call(
                held,
                refresh,
                functools.partial(_start, backward),
                plan.clipped is not None,
                numbers,
                others(parameters, plan),
                module is None or ddp.syncs(module),
            )
            node.register_prehook(call.before_backward)
            node.register_hook(call.after_backward)
        return results

    def ask(self, parameters: Sequence[Tensor]) -> tuple[tuple[WeightInput, ...], dict[int, ProjectedParameter]]:
        """Look up what the optimizers want of the parameters that came in.

        Args:
            parameters: in the order of the graph's inputs.

        Returns:
            The weights that a grass optimizer wants projected, and their records by position.

        Raises:
            ConfigError: the model runs inside a wrapper that would be silently wrong, or the ranks differ.
        """
        weights, records, managers = [], {}, {}
        module, gatherings = ddp.active(), fsdp.Gatherings()
        asked, free = [], []
        for (position, name), parameter in zip(self.captured.parameters, parameters, strict=True):
            record = registry.lookup(parameter)
            if record is None or (record.sharded and registry.lookup(record.parameter) is not record):  # it has a new optimizer
                record = self._behind(name, parameter, gatherings)
            elif record.found is not None:
                fsdp.check(record.name or name, record.found)
            if record is not None:
                managers[id(record.owner)] = manager_of(record)
            if parameter.dim() == 2 and parameter.requires_grad:
                if record is None:
                    free.append((name, position, parameter))
                elif record.options.rank is not None:
                    record.name = record.name or name
                    asked.append((position, name, record))
        for manager in managers.values():  # those that project nothing, too: on another rank they may
            manager.note_reading()
            manager.ranks.meet_owners()
            if module is not None:
                manager.ranks.meet([ddp.ranks_of(module)])
        hooks = _autograd.have_hooks([record.parameter for _, _, record in asked])
        for (position, name, record), hooked in zip(asked, hooks, strict=True):
            if module is not None:
                record.spread(ddp.layout_of(module))
            own = record.sharded and record.gathered is record.parameter
            if own and refusal(record.name or name, record.parameter, record.options, hooked) is None:
                record.spread(tensor_parallel.layout_of(record.parameter))
            if record.layout is not None:
                manager_of(record).ranks.meet(record.layout.mesh)
            weights.append(WeightInput(record.name, position, record.config(), record.refusal(name, hooked)))
            records[position] = record
        if self.options.project is not None:
            self._wish(free, gatherings)
        elif not managers and any(isinstance(parameter, torch.nn.Parameter) for parameter in parameters):
            self._warn_unheld()
        return tuple(weights), records

    def _behind(self, name: str, parameter: Tensor, gatherings: fsdp.Gatherings) -> ProjectedParameter | None:
        """The record of the sharded parameter of which this one is the whole, if FSDP2 has gathered it.

        Raises:
            ConfigError: it is sharded in a way that is not supported.
        """
        found = gatherings.behind(parameter)
        record = registry.lookup(found.parameter) if found is not None else None
        if found is None or record is None:
            return None
        registry.register_gathered(record, parameter, found)
        if parameter.dim() == 2 and record.options.rank is not None:
            record.spread(fsdp.layout_of(record.name or name, found, parameter))
        return record

    def _wish(self, free: Sequence[tuple[str, int, Tensor]], gatherings: fsdp.Gatherings) -> None:
        """Note which weights could be projected once a known optimizer turns out to hold them. Of one that FSDP2 has gathered, an
        optimizer holds the sharded parameter.

        Raises:
            ConfigError: one is to be projected along the dimension that is sharded, or is sharded in a way that is not supported.
        """
        options = self.options.project
        assert options is not None and options.rank is not None
        behind = {at: found for _, at, tensor in free if not is_sharded(tensor) and (found := gatherings.behind(tensor))}
        held = {at: behind[at].parameter if at in behind else tensor for _, at, tensor in free}
        layouts = {at: fsdp.layout_of(name, behind[at], tensor) for name, at, tensor in free if at in behind}
        hooks = _autograd.have_hooks(list(held.values()))
        config, asked = options.site(options.axis, False, AdamWRule()), []
        for (name, at, tensor), hooked in zip(free, hooks, strict=True):
            why = refusal(name, tensor, options, hooked) or why_left_out(layouts.get(at))
            asked.append(WeightInput(name, at, dataclasses.replace(config, layout=layouts.get(at)), why))
        analysis = self.variants.analyse(tuple(asked))[1] if asked else Analysis((), ())
        check_sharded(analysis)
        for p in analysis.projections:
            assigned, kernel = Assigned(p.axis, p.dim, p.rank, p.why), functools.partial(kernels.run, self.options)
            wished = adoption.Wish(p.name, options, assigned, kernel, layouts.get(p.position))
            adoption.wish(held[p.position], wished)

    def _warn_unheld(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "no grass optimizer holds the parameters of this model, so it is compiled as by Inductor alone. Write: "
                "opt = grass_compile.AdamW(model.named_parameters(), lr=..., rank=...) before the first backward, or keep your "
                "torch.optim.AdamW, Adam or SGD and compile with options={'rank': ...}.",
                GrassWarning,
                stacklevel=2,
            )

    # ---------------------------------------------------------------------------------------------------- the plans

    def plan(self, parameters: Mapping[int, Tensor]) -> tuple[Plan | None, dict[int, ProjectedParameter]]:
        """The plan for the parameters of a call, by position; None if nothing is projected. With the records of the weights
        that could be.

        Raises:
            GraphError: ``strict``, and a weight that should be projected is not.
            ConfigError: see `ask`.
        """
        weights, records = self.ask(list(parameters.values()))
        if not weights:
            return None, records
        return self.variants.plan(weights, records, clipped_inside(parameters, records)), records


def _without_gradients(args: Sequence[Any], plan: Plan) -> list[Any]:
    """The inputs of a call, in which projected weights have no place in the autograd graph: their gradients come by their leaves
    (`grass_compile.runtime.delivery`). So do those of dense parameters that are clipped along with them."""
    given = list(args)
    projected = {projection.position for projection in plan.projections}
    for weight in plan.weights:
        tensor = given[weight.position]
        if weight.position in projected:
            given[weight.position] = part_read(weight, tensor).detach()
        elif reads_part(weight, tensor):
            given[weight.position] = tensor.to_local()
    for position in plan.clipped or ():
        record = registry.lookup(given[position])
        assert record is not None
        given[position] = twin_of(record)
    return given


def _start(backward: LazyGraph, key: Any, broke_off: Callable[[Any], None]) -> None:
    backward.will_run(Run(key, _autograd.graph_task(), broke_off))

"""``grass_compile.explain``: which weights of a model the backend would project, without training it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import _dynamo
from .backend.region import Region
from .config import BackendOptions
from .distributed.crossed import part_of_gradient
from .errors import ConfigError, GrassError
from .optim.base import GrassOptimizer
from .passes.records import Projection
from .report import Report, Row
from .runtime import registry
from .runtime.compact import Assigned, initial_state


class Findings:
    """The verdicts of a model's regions on its parameters, collected while the model runs once."""

    def __init__(self) -> None:
        self.projections: dict[Tensor, Projection] = {}
        self.reasons: dict[Tensor, str] = {}
        self.calls: dict[Tensor, int] = {}
        self.leaders: dict[Tensor, str] = {}
        self.error: GrassError | None = None

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Analyse a Dynamo graph for the parameters that come in; run it eagerly."""
        region = Region(gm, example_inputs, BackendOptions(compiler="aot_eager"), compile_now=False)

        def run(*args: Any) -> Any:
            if region.trains:
                try:
                    self._look(region, args)
                except GrassError as error:
                    self.error = error
            return gm.forward(*args)

        return _dynamo.outside_dynamo(run)

    def _look(self, region: Region, args: Sequence[Any]) -> None:
        parameters = {position: args[position] for position, _ in region.captured.parameters}
        weights, records = region.ask(list(parameters.values()))
        if not weights:
            return
        parameters |= {position: record.parameter for position, record in records.items()}  # FSDP2's gathered one came in
        _, analysis = region.variants.analyse(weights)
        first: dict[int, str] = {}
        for projection in analysis.projections:
            parameter = parameters[projection.position]
            if projection.config.share_index and projection.reads is not None:
                self.leaders[parameter] = first.setdefault(projection.reads, projection.name)
            self.projections[parameter] = projection
            self.calls[parameter] = self.calls.get(parameter, 0) + 1
        for refusal in analysis.refusals:
            self.reasons[parameters[refusal.weight.position]] = refusal.reason


def explain(model: nn.Module, *args: Any, optimizer: GrassOptimizer | None = None, **kwargs: Any) -> Report:
    """Say for each parameter whether it is projected, how, and why.

    The model runs forward once, eagerly, on ``args`` and ``kwargs``, with its random state restored afterwards. Nothing is
    trained, and no state is created in the optimizer.

    Args:
        model: the model, compiled or not.
        *args: its inputs.
        optimizer: a grass optimizer that holds its parameters.
        **kwargs: its keyword inputs.

    Returns:
        A `Report`; ``str()`` of it is a table.

    Raises:
        ConfigError: the optimizer holds none of the model's parameters, or the model itself is refused.
    """
    model = getattr(model, "_orig_mod", model)
    if optimizer is not None:
        _check_held(model, optimizer)
    findings = Findings()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with _uncompiled(model), torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.compile(model, backend=findings.backend)(*args, **kwargs)
    if findings.error is not None:
        raise findings.error
    moves = str(optimizer.fused) if isinstance(optimizer, GrassOptimizer) else ""
    return Report(tuple(_row(name, parameter, findings) for name, parameter in model.named_parameters()), moves)


def _check_held(model: nn.Module, optimizer: GrassOptimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ConfigError(
            "the optimizer holds none of this model's parameters; make it from model.named_parameters() of this very model."
        )


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Any:
    """Submodules compiled one by one run as they were written."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, implementation in compiled.items():
            module._compiled_call_impl = implementation


def _row(name: str, parameter: Tensor, findings: Findings) -> Row:
    shape, dtype = tuple(parameter.shape), parameter.dtype
    projection = findings.projections.get(parameter)
    if projection is None:
        reason = findings.reasons.get(parameter) or _why_dense(parameter)
        return Row(name, shape, dtype, False, None, None, reason)
    record = registry.lookup(parameter)
    reason = (record.assigned.why if record is not None and record.assigned is not None else "") or projection.why
    if projection.rank < projection.config.rank:
        reason += f"; rank {projection.config.rank} clamped to {projection.rank}"
    if findings.calls[parameter] > 1:
        reason += f"; reached by {findings.calls[parameter]} calls of compiled regions, so it moves in opt.step()"
    axis, rank, dim, kind = projection.axis, projection.rank, projection.dim, projection.config.projection
    if findings.leaders.get(parameter, projection.name) != projection.name:
        reason += f"; shares its columns with {findings.leaders[parameter]}"
    if kind != "grass":
        reason = f"projection={kind!r}; {reason}"
    where, layout = (name, shape, dtype, True, axis, rank, reason, dim), projection.config.layout
    row = Row(*where, projection.tokens, _state_bytes(parameter, projection), kind)
    if layout is None:
        return row
    travels = layout.reduce_dtype or (record.gathered.dtype if record is not None else dtype)
    sent = row.compact_elements * travels.itemsize // layout.copies if layout.averages else 0
    if layout.crossed is not None:  # each update of a part of the features, too
        sent += rank * layout.crossed.shape[1 - dim] * torch.promote_types(dtype, torch.float32).itemsize
    return dataclasses.replace(row, reason=f"{reason}; {layout}", spread=str(layout), sent_bytes=sent)


def _state_bytes(parameter: Tensor, projection: Projection) -> int:
    """Bytes of the state that the update rule keeps for a weight, and of a basis."""
    config, assigned = projection.config, Assigned(projection.axis, projection.dim, projection.rank)
    shadow = part_of_gradient(parameter.detach()).to("meta")
    how = config.on_refresh, config.rule, config.state_dtype, config.checked, config.projection
    state = initial_state(shadow, assigned, *how)
    names = (*config.rule.state_names, *(("basis",) if "basis" in state else ()))
    return sum(state[name].numel() * state[name].element_size() for name in names)


def _why_dense(parameter: Tensor) -> str:
    """The reason for a parameter that no region was asked about."""
    record = registry.lookup(parameter)
    if not parameter.requires_grad:
        return "it needs no gradient"
    if record is None:
        return "no grass optimizer holds it"
    if record.options.rank is None:
        return "its group has rank=None"
    if parameter.dim() != 2:
        return f"it has {parameter.dim()} dimension{'s' * (parameter.dim() != 1)}; only matrices can be projected"
    return "no compiled region reads it"

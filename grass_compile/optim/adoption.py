"""Unmodified scripts: weights that a script's own ``torch.optim`` optimizer holds, taken over at its first ``step()``.

A region compiled with ``options={"rank": r}`` notes which weights it could project (`Wish`). At the first ``step()`` after a
backward, the optimizer that holds them is known, and with it the update rule: the weight's full gradient chooses the rows, the
compact state goes into ``optimizer.state[p]``, and from then on backwards leave compact gradients. Torch's global step hooks run
the compact steps, with hyper-parameters read live from ``param_groups``; the optimizer's own code sees only what stays dense.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .. import _dynamo
from ..config import GroupOptions
from ..distributed.layout import Layout
from ..errors import GrassWarning, StateError
from ..math.rule import Rule
from ..runtime import registry
from ..runtime.checkpoint import fitting, local, placed, protect, unprotect
from ..runtime.compact import Assigned, is_compact
from ..runtime.delivery import reduce
from ..runtime.gradient import CompactGrad
from ..runtime.manager import ProjectionManager
from ..runtime.parameter import Kernel, ProjectedParameter
from ..runtime.step_checks import check_step
from .base import GrassOptimizer
from .rules import AdamRule, AdamWRule, SGDRule


@dataclasses.dataclass(frozen=True)
class Wish:
    """How a region would project a weight, once an optimizer that we know turns out to hold it."""

    name: str
    options: GroupOptions
    assigned: Assigned
    kernel: Kernel
    layout: Layout | None = None
    """How FSDP2 spreads it."""


_wishes: WeakIdKeyDictionary = WeakIdKeyDictionary()
_managers: weakref.WeakKeyDictionary[torch.optim.Optimizer, ProjectionManager] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_finder: list[Any] = []
"""The handle of the hook that looks for the optimizers that hold what is wished for."""


def wish(parameter: Tensor, wished: Wish) -> None:
    """Note that a region could project ``parameter``. From the first wish on, every optimizer's ``step()`` is looked at; one that
    holds such a parameter gets hooks of its own."""
    _wishes[parameter] = wished
    if not _finder:
        _finder.append(register_optimizer_step_pre_hook(_find))


@_dynamo.outside_dynamo
def _find(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Hook an optimizer that holds a parameter which is wished for, or which another one has taken over."""
    if isinstance(optimizer, GrassOptimizer) or optimizer in _hooked:
        return
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if any(parameter in _wishes or registry.lookup(parameter) is not None for parameter in parameters):
        _hooked.add(optimizer)
        optimizer.register_step_post_hook(after_step)
        optimizer.register_step_pre_hook(before_step)
    return


_hooked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


# ------------------------------------------------------------------------------------------------------ which optimizers


def _adamw(group: Mapping[str, Any]) -> Rule | str:
    if reason := _adam_refusal(group):
        return reason
    return AdamWRule()


def _adam(group: Mapping[str, Any]) -> Rule | str:
    if reason := _adam_refusal(group):
        return reason
    return AdamWRule() if group.get("decoupled_weight_decay") else AdamRule()


def _adam_refusal(group: Mapping[str, Any]) -> str | None:
    flags = [flag for flag in ("amsgrad", "maximize", "differentiable") if group.get(flag)]
    return f"{flags[0]}=True" if flags else None


def _sgd(group: Mapping[str, Any]) -> Rule | str:
    flags = [flag for flag in ("maximize", "differentiable") if group.get(flag)]
    return f"{flags[0]}=True" if flags else SGDRule(float(group["momentum"]) != 0, bool(group["nesterov"]))


RULES: dict[type, Callable[[Mapping[str, Any]], Rule | str]] = {
    torch.optim.AdamW: _adamw,
    torch.optim.Adam: _adam,
    torch.optim.SGD: _sgd,
}
"""For each optimizer class, the rule for one of its groups, or what we do not support about it."""


# ----------------------------------------------------------------------------------------------------------- the hooks


@_dynamo.outside_dynamo
def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Take weights over, run the compact steps, and hide their gradients from the optimizer's own code.

    Raises:
        StateError: a loaded state does not fit its weight, or two optimizers hold one.
    """
    changed = None
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    if closure is not None and type(optimizer) in RULES:  # it runs the backward, so it has to run before we look
        with torch.enable_grad():
            loss = closure()
        changed = (args[0], lambda: loss), {key: value for key, value in kwargs.items() if key != "closure"}
    _take_over(optimizer)
    manager = _managers.get(optimizer)
    if manager is not None:
        check_step(manager)
        manager.average()
        waiting = manager.pending()
        if _unscaled(optimizer, waiting):
            manager.apply(waiting)
        manager.hidden = {parameter: parameter.grad for parameter in waiting if parameter.grad is not None}
        for parameter in waiting:
            parameter.grad = None
    return changed


@_dynamo.outside_dynamo
def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Show the gradients again: it is ``zero_grad`` that clears them.

    Raises:
        NonFiniteError: as ``nonfinite="raise"`` says, after all else is done.
    """
    manager = _managers.get(optimizer)
    if manager is not None:
        for parameter, gradient in manager.hidden.items():
            parameter.grad = gradient
        manager.hidden = {}
        manager.close()


def _unscaled(optimizer: torch.optim.Optimizer, waiting: Mapping[Tensor, CompactGrad]) -> bool:
    """Do what a fused optimizer does for ``GradScaler``: unscale; returns whether the step is to be taken."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if scale is not None:
        for gradient in waiting.values():
            gradient.compact.div_(scale.to(gradient.compact.device))
    return found_inf is None or not bool(found_inf)


def _take_over(optimizer: torch.optim.Optimizer) -> None:
    manager = _managers.get(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            record = registry.lookup(parameter)
            if record is not None and record.owner is not manager and record.pending is not None:
                raise StateError(
                    f"{record.label}: another optimizer has projected it and holds its compact state. Delete that optimizer "
                    "before another one takes over."
                )
            wished = _wishes.get(parameter)
            if wished is None or parameter.grad is None or record is not None:
                continue
            rule = RULES[type(optimizer)](group) if type(optimizer) in RULES else f"class {type(optimizer).__name__}"
            if isinstance(rule, str):
                _warn(optimizer, rule)
                continue
            if manager is None:
                manager = _managers[optimizer] = ProjectionManager(optimizer, False)
                optimizer.register_state_dict_post_hook(_saved)
                optimizer.register_load_state_dict_post_hook(_loaded)
            _adopt(manager, parameter, group, wished, rule)
            del _wishes[parameter]


def _adopt(manager: ProjectionManager, parameter: Tensor, group: dict[str, Any], wished: Wish, rule: Rule) -> None:
    """Project one weight from this step on; its full gradient chooses the rows where a loaded state does not."""
    assert manager.optimizer is not None and parameter.grad is not None
    loaded, before = manager.optimizer.state.get(parameter, {}), {}
    if loaded and not is_compact(loaded):
        trained = any(isinstance(value, Tensor) and value.dim() > 0 and bool(value.count_nonzero()) for value in loaded.values())
        if trained and float(loaded.get("step", 2)) > 1:
            return  # trained dense so far: its full moments are not thrown away
        if trained:  # by one step, whose closure ran the very first forward
            before = manager.optimizer.state.pop(parameter)
        loaded = {}
    manager.add(parameter, wished.name, group, wished.options, rule)
    record = manager.records[parameter]
    record.spread(wished.layout)
    assigned = wished.assigned
    if loaded:
        assigned, state = fitting(record, local(unprotect(loaded)))
        record.resume(assigned, state)
    record.assign(assigned, wished.kernel)
    made = reduce(record)
    if before and before.keys() >= set(rule.state_names) and wished.options.projection == "grass":
        _go_on(record, made, before)


def _go_on(record: ProjectedParameter, gradient: CompactGrad, before: Mapping[str, Any]) -> None:
    """Keep what a dense step has left in the rows that the next one's gradient has chosen."""
    assert record.assigned is not None
    record.choose(gradient.rows)
    for name in record.rule.state_names:
        record.state[name].copy_(before[name].index_select(record.assigned.dim, gradient.rows))
    record.state["step"].fill_(float(before.get("step", 1)))
    record.state["updates"] = 1
    gradient.fresh, record.chosen = False, (gradient.rows, False, None)


def _saved(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Make the compact state in a ``state_dict`` ready to be loaded by torch's code; what belongs to the part of a sharded weight
    that this rank owns, for ``torch.distributed.checkpoint`` too."""
    records = _managers[optimizer].records
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in state_dict["state"].items():
        record = records.get(order[number])
        if record is not None and record.sharded and is_compact(entry):
            state_dict["state"][number] = placed(record, entry)
    return protect(optimizer, state_dict)


def _loaded(optimizer: torch.optim.Optimizer) -> None:
    """After a ``load_state_dict`` into an optimizer that has taken weights over: they go on from the loaded state.

    Raises:
        StateError: a loaded state does not fit its weight.
    """
    manager = _managers.get(optimizer)
    if manager is None:
        return
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, record in manager.records.items():
        record.group = groups[parameter]
        record.forget()
        entry = optimizer.state.get(parameter, {})
        if is_compact(entry):
            record.resume(*fitting(record, local(unprotect(entry))))
        elif record.assigned is not None and record.kernel is not None:
            optimizer.state.pop(parameter, None)
            record.assign(record.assigned, record.kernel)
    manager.forget_numbers()


def _warn(optimizer: torch.optim.Optimizer, what: str) -> None:
    if optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"torch.compile(..., options={{'rank': ...}}) does not know this optimizer ({what}), so its weights stay dense. Use "
            "torch.optim.AdamW, Adam or SGD, or grass_compile.AdamW.",
            GrassWarning,
            stacklevel=_dynamo.stacklevel_of_caller(),
        )

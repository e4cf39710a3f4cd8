"""What is checked at ``opt.step()``, and before another state is loaded: that a script has left weights and gradients in a state
from which the step that it asks for can be taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import StateError
from . import registry
from .delivery import reduce
from .gradient import CompactGrad
from .manager import ProjectionManager
from .moved import MovedGrad
from .parameter import ProjectedParameter


def check_step(manager: ProjectionManager) -> None:
    """Refuse what a step would use wrongly, and bring gradients that came in full into their compact form.

    Raises:
        StateError: a weight belongs to another optimizer by now; a hyper-parameter is another than the one by which weights have
            already moved; a weight that has moved, or its gradient, was written since.
    """
    for parameter, record in manager.records.items():
        if parameter.grad is not None and registry.lookup(parameter) is not record:
            raise StateError(f"{record.label}: another optimizer has taken it over; this one must not be used any more.")
    _check_numbers(manager)
    manager.watch.look_back(manager.records.values())
    for record in manager.records.values():
        _check_moved(manager, record)
        _make_compact(manager, record)


def _check_moved(manager: ProjectionManager, record: ProjectedParameter) -> None:
    """Refuse what a script did to a weight that has moved inside the backward, or to its gradient."""
    gradient = record.gradient
    if isinstance(gradient, MovedGrad) and not record.moved:
        _take_old(manager, record, gradient)
    if record.moved and gradient is not record.stand_in:
        manager.watch.failed("gradients are replaced or dropped between backward() and opt.step()")
        raise record.stand_in.refusal("dropped" if gradient is None else "replaced")
    if record.moved and record.seen != record.look():
        manager.watch.failed("weights are written between backward() and opt.step()")
        raise StateError(
            f"{record.label}: it was written between the backward, in which it has already moved, and opt.step(). Write "
            "it after opt.step(), or make the optimizer with step_in_backward=False."
        )


def _make_compact(manager: ProjectionManager, record: ProjectedParameter) -> None:
    """Bring a gradient that is not the one which was delivered into its compact form."""
    gradient = record.gradient
    if record.assigned is None and isinstance(gradient, CompactGrad):
        raise StateError(
            f"{record.label}: its gradient is the compact one of another optimizer, which holds only some rows. "
            "Call opt.zero_grad() and run forward and backward again."
        )
    if record.assigned is None or gradient is None or isinstance(gradient, MovedGrad):
        return
    if isinstance(gradient, CompactGrad):
        if record.delivered is None or record.delivered() is not gradient:  # another weight's, or a copy
            record.gradient = gradient.full()
            reduce(record)
        return
    if record.chosen is None:
        manager.warn_once(
            "full",
            f"{record.label}: it is projected, yet its gradient came in full, from outside of the compiled region (eager code, a "
            "graph break, a shape beyond the recompile limit, a hook added later). Its selected rows are used. Compile that code "
            "too, or keep the weight dense with exclude=.",
        )
    reduce(record)


def _take_old(manager: ProjectionManager, record: ProjectedParameter, gradient: MovedGrad) -> None:
    """Take a gradient from before the last ``opt.step()`` as torch does, which applies what it finds: zeros are a gradient.

    Raises:
        StateError: it was not cleared.
    """
    if not record.owns(gradient):
        raise StateError(
            f"{record.label}: another optimizer has already applied this gradient. Call opt.zero_grad() and run forward and "
            "backward again."
        )
    if not gradient.zeroed:
        manager.watch.failed("gradients are not cleared after opt.step()")
        raise StateError(
            f"{record.label}: the gradient of its last step was not cleared, and cannot be applied again since it is gone. "
            "Call opt.zero_grad() after each opt.step()."
        )
    record.gradient = torch.zeros_like(record.weight)
    reduce(record)


def _check_numbers(manager: ProjectionManager) -> None:
    """Compare the hyper-parameters with those at the backward.

    Raises:
        StateError: weights have moved by others.
    """
    changed = manager.changed_numbers()
    if not changed:
        return
    manager.watch.failed("hyper-parameters are written between backward() and opt.step()")
    if moved := [record for record in manager.records.values() if record.moved]:
        name, began, now = changed[0]
        raise StateError(
            f"{name} was changed from {began!r} to {now!r} after the backward, in which {len(moved)} weights ({moved[0].label} "
            "the first) have moved by the old value. Write it before the backward, or make the optimizer with "
            "step_in_backward=False."
        )


def check_idle(manager: ProjectionManager) -> None:
    """Refuse another state between a backward that has moved weights and its ``opt.step()``; one that broke off is what
    checkpoints are there for.

    Raises:
        StateError: naming a weight.
    """
    moved = [record for record in manager.records.values() if record.moved]
    if moved and not manager.broken:
        raise StateError(
            f"{moved[0].label}: it has moved inside the backward, and its step is not closed. Call opt.step() or "
            "opt.zero_grad() before load_state_dict(). Nothing was changed."
        )


def check_rows(record: ProjectedParameter, state: Mapping[str, Any]) -> None:
    """Refuse a state of other rows than those of a gradient that waits.

    Raises:
        StateError: naming the weight.
    """
    gradient = record.pending
    if gradient is None or gradient.zeroed or gradient.fresh or record.chosen is None:
        return
    if not torch.equal(gradient.rows, state[record.selector].to(gradient.rows.device)):
        raise StateError(
            f"{record.label}: a gradient of it waits that was computed for other rows than those of the loaded state. Call "
            "opt.step() or opt.zero_grad() before load_state_dict(). Nothing was changed."
        )

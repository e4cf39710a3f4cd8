"""One optimizer step on one weight, as pure functions over tensors; `run_eagerly` alone writes.

Grass (arXiv 2406.17660), Algorithm 1, for a selection with unit row scale: ``C = G[idx]``,
``(state, update) = rule(C, state)``, ``W[idx] -= scale * update``. With a dense projection ``P`` (see `projection`),
``C = P^T G`` and ``W -= scale * P update``.

`apply` is the step; `grass_compile.passes.kernel` compiles it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _autograd
from ..distributed import crossed
from ..errors import GraphError
from ..ops.once import once
from ..ops.rank_update import rank_update
from ..ops.row_update import row_update
from .layout import SHARED_HYPER
from .noise import rounding_noise
from .projection import basis_of
from .projection import selected as select
from .rounding import round_stochastically
from .rule import Rule

if TYPE_CHECKING:
    from ..config import SiteConfig


def apply_all(
    config: SiteConfig, dim: int, compact_grad: Tensor, weight: Tensor, hyper: Tensor, selector: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """`apply` with the tensors in the order of a graph's inputs."""
    return apply(config, dim, compact_grad, weight, hyper, selector, state)


def run_eagerly(
    config: SiteConfig, dim: int, compact_grad: Tensor, weight: Tensor, hyper: Tensor, selector: Tensor, *state: Tensor
) -> None:
    """The step in place and not compiled, for a weight that no region has been compiled for yet (after a resume, say)."""
    with _autograd.without_autocast():
        new_weight, *new_state = apply(config, dim, compact_grad, weight, hyper, selector, state)
    weight.copy_(new_weight)
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)


def kept(compact_grad: Tensor) -> tuple[Tensor]:
    """The compact gradient as it waits for ``opt.step()``: in at least fp32, since others may be added."""
    return (compact_grad.to(torch.promote_types(compact_grad.dtype, torch.float32)),)


def selected(projection: str, dim: int, rank: int, gradient: Tensor, selector: Tensor) -> tuple[Tensor]:
    """The compact gradient from the full one, for rows that have been chosen before."""
    return (select(projection, dim, rank, gradient, selector),)


def apply(
    config: SiteConfig,
    dim: int,
    compact_grad: Tensor,
    weight: Tensor,
    hyper: Tensor,
    selector: Tensor,
    state: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The step itself: the new weight, and the new state after ``selector``.

    Where gradients are checked and this one is not finite, all of it comes out as it went in, except the count of such steps.
    """
    rule, wide = config.rule, torch.promote_types(weight.dtype, torch.float32)
    numbers = dict(zip((*rule.hyper_names, *SHARED_HYPER), hyper.unbind(), strict=True))
    compact_grad = compact_grad.to(wide)
    ok, step, counts, state = _counted(config, dim, compact_grad, hyper, state)
    weight_rows = None
    if rule.reads_weight or (config.decays and rule.coupled_decay):
        weight_rows = _rows_of(config, dim, compact_grad.shape[dim], weight, selector).to(wide)
    if config.decays and rule.coupled_decay:
        compact_grad = compact_grad + numbers["weight_decay"] * weight_rows
    given = dict(zip(rule.state_names, state, strict=True))
    named = {name: _seen(rule, dim, name, tensor, wide) for name, tensor in given.items()}
    named["step"] = _rows_first(rule, dim, step)
    if rule.reads_weight and weight_rows is not None:
        named["weight"] = _rows_first(rule, dim, weight_rows)
    update, new = run_rule(rule, _rows_first(rule, dim, compact_grad), named, numbers)
    update = _rows_first(rule, dim, update)
    if config.scale != 1.0:
        update = update * config.scale
    noise = None
    if config.stochastic_rounding and torch.bfloat16 in (weight.dtype, *(tensor.dtype for tensor in state)):
        noise = rounding_noise(compact_grad.shape, numbers["seed"])
    moments = []
    for name, old in given.items():
        moment = _stored(rule, dim, name, new[name], old)
        rounds = noise is not None and old.dtype == torch.bfloat16 and rule.layout(name) == "full"
        moment = round_stochastically(moment, noise) if rounds and noise is not None else moment.to(old.dtype)
        moments.append(_unless_skipped(ok, moment, old))
    step_by = _unless_skipped(ok, -update, -0.0)  # adding -0.0 changes no bit, of zeros either
    return (_moved(config, dim, weight, numbers, selector, step_by, noise, ok), *counts, *moments)


def _counted(
    config: SiteConfig, dim: int, compact_grad: Tensor, hyper: Tensor, state: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor, list[Tensor], list[Tensor]]:
    """Whether the step is taken (None: it always is), its number, the new counts, and the rest of the state."""
    _, *state = state
    total = (compact_grad * compact_grad).sum()
    counts, ok, step = [total.reshape(1)], None, hyper[len(config.rule.hyper_names) + SHARED_HYPER.index("step")]
    if config.checked:
        skipped, *state = state
        ok = once(total.isfinite())
        counts.append(skipped + ok.logical_not())
    if config.counted:
        counted, *state = state
        counts.append(_unless_skipped(ok, counted + 1, counted))
        step = (counted + 1).to(hyper.dtype)
        step = step.unsqueeze(1 - dim) if step.dim() else step
    return ok, step, counts, state


def _moved(
    config: SiteConfig, dim: int, weight: Tensor, numbers: Mapping[str, Tensor], selector: Tensor, step_by: Tensor,
    noise: Tensor | None, ok: Tensor | None,
) -> Tensor:  # fmt: skip
    """The weight after its decay and an update of its rows."""
    rounds = noise is not None and weight.dtype == torch.bfloat16
    if config.decays and not config.rule.coupled_decay:
        decayed = weight.to(step_by.dtype) * _unless_skipped(ok, numbers["decay"], 1.0)
        if config.stochastic_rounding and weight.dtype == torch.bfloat16:
            weight = round_stochastically(decayed, rounding_noise(weight.shape, numbers["seed"] + 1.0))
        else:
            weight = decayed.to(weight.dtype)
    moved: Tensor
    if config.crossed is not None:
        update, chosen = crossed.update_of_owned(weight, dim, selector, step_by, config.crossed)
        rows = weight.to(update.dtype) + update
        if rounds:
            rows = round_stochastically(rows, rounding_noise(weight.shape, numbers["seed"] + 2.0))
        moved = torch.where(chosen, rows.to(weight.dtype), weight)
    elif config.projection == "grass":
        moved = row_update(weight, dim, selector, step_by, noise if rounds else None)
    else:
        basis = basis_of(config.projection, selector, weight.shape[dim], step_by.shape[dim], weight.dtype)
        moved = rank_update(weight, dim, basis, step_by, numbers["seed"] if rounds else None)
    return moved


def _rows_of(config: SiteConfig, dim: int, rank: int, weight: Tensor, selector: Tensor) -> Tensor:
    """What the rule steps of a weight, ``[r, n]`` or ``[m, r]``."""
    if config.crossed is not None:
        return crossed.rows_of(weight, dim, selector, config.crossed)
    return select(config.projection, dim, rank, weight, selector)


def _unless_skipped(ok: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """``new``, or ``old`` where the step is skipped; ``ok`` is None where none ever is."""
    return new if ok is None else torch.where(ok, new, old)


def _rows_first(rule: Rule, dim: int, tensor: Tensor) -> Tensor:
    """A tensor of the compact gradient's shape as the rule sees it, and back: selected rows first, so columns are transposed,
    unless the rule is elementwise."""
    return tensor.t() if dim and not rule.elementwise and tensor.dim() == 2 else tensor


def _seen(rule: Rule, dim: int, name: str, tensor: Tensor, wide: torch.dtype) -> Tensor:
    """A state tensor as the rule sees it; codes in their own dtype."""
    tensor = tensor if name in rule.state_dtypes else tensor.to(wide)
    return _rows_first(rule, dim, tensor) if rule.layout(name) == "full" else rule.seen(name, tensor)


def _stored(rule: Rule, dim: int, name: str, tensor: Tensor, old: Tensor) -> Tensor:
    """The inverse of `_seen`."""
    return _rows_first(rule, dim, tensor) if rule.layout(name) == "full" else tensor.reshape(old.shape)


def run_rule(
    rule: Rule, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``rule.update``, and a check that it keeps its word.

    Raises:
        GraphError: it fails, changes its inputs, or returns other tensors than it took.
    """
    inputs = [compact_grad, *state.values(), *hyper.values()]
    versions = [tensor._version for tensor in inputs]
    try:
        update, new = rule.update(compact_grad, state, hyper)
    except Exception as error:
        raise GraphError(f"{_where(rule, error)}: update() cannot be traced: {error}") from error
    name = _where(rule)
    if [tensor._version for tensor in inputs] != versions:
        raise GraphError(f"{name}: update() changes its arguments in place; return new tensors instead.")
    if set(new) != set(rule.state_names):
        raise GraphError(f"{name}: update() returns the states {sorted(new)}, its state_names are {sorted(rule.state_names)}.")
    for key, tensor in (("update", update), *new.items()):
        old = compact_grad if key == "update" else state[key]
        if tensor.shape != old.shape or tensor.dtype != old.dtype:
            raise GraphError(
                f"{name}: update() returns {key!r} of shape {list(tensor.shape)} and {tensor.dtype}; it has to be of shape "
                f"{list(old.shape)} and {old.dtype}."
            )
    return update, new


def _where(rule: Rule, error: BaseException | None = None) -> str:
    """The rule's class, and the line of its source that an error comes from, or where ``update`` begins."""
    update = type(rule).update
    file, line = update.__code__.co_filename, update.__code__.co_firstlineno
    frame = error.__traceback__ if error is not None else None
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == file:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"{type(rule).__name__} ({file}:{line})"


def clip_scales(checked: bool, hyper: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    """The common norm of gradients, and for each the factor that brings it down to ``max_norm``, as
    ``torch.nn.utils.clip_grad_norm_``; with ``checked``, as `grass_compile.runtime.nonfinite.clip_`."""
    squares = torch.stack([(gradient.to(hyper.dtype) ** 2).sum() for gradient in gradients])
    finite = squares.isfinite()
    norm = (torch.where(finite, squares, 0.0) if checked else squares).sum().sqrt()
    scale = (hyper[-1] / (norm + 1e-6)).clamp(max=1.0)
    if not checked:
        return norm, *[scale for _ in gradients]
    return norm, *torch.where(finite & norm.isfinite(), scale, float("nan")).unbind()


def scaled(gradient: Tensor, scale: Tensor) -> tuple[Tensor]:
    """``gradient * scale`` in the gradient's dtype."""
    return ((gradient * scale).to(gradient.dtype),)

"""One optimizer step on one weight, as pure functions over tensors. The pass `fuse` traces them into the backward graph.

Grass (arXiv 2406.17660), Algorithm 1, for a selection with unit row scale: ``C = G[idx]``,
``(state, update) = rule(C, state)``, ``W[idx] -= scale * update``.

Both functions take ``(config, dim, rank, gradient, weight, hyper, index, step, *rule_state)`` and return the new value of
every tensor that changes, the weight first. ``dim`` is the stored dimension of the weight that ``index`` selects along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import selection
from .ops import row_update

if TYPE_CHECKING:
    from ..config import SiteConfig

DECAY = "decay"
"""The last element of ``hyper``: ``1 - lr * weight_decay``, the factor on the whole weight."""


def regular_step(
    config: SiteConfig, dim: int, rank: int, compact_grad: Tensor, weight: Tensor, hyper: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """A step with the rows that the last refresh chose.

    Args:
        config: what the optimizer asked of this weight.
        dim: the stored dimension that is indexed.
        rank: r.
        compact_grad: ``[r, n]`` or ``[m, r]``.
        weight: ``[m, n]``.
        hyper: ``[len(rule.hyper_names) + 1]``.
        *state: ``index`` ``int64[r]``, ``step`` (0-d, or ``[r]`` with ``on_refresh="carry"``), the rule's state.

    Returns:
        weight, step, and the rule's state, all new.
    """
    index, step, *moments = state
    return _apply(config, dim, compact_grad, weight, hyper, index, step, moments)


def refresh_step(
    config: SiteConfig, dim: int, rank: int, gradient: Tensor, weight: Tensor, hyper: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """A step that first chooses new rows from the full gradient, then resets or carries the state.

    Args:
        gradient: ``[m, n]``, full; everything else as in `regular_step`.

    Returns:
        weight, index, step, and the rule's state, all new.
    """
    old_index, step, *moments = state
    index = selection.top(selection.scores(gradient, dim), rank)
    if config.on_refresh == "carry":
        step, moments = carried(gradient.shape[dim], dim, old_index, index, step, moments)
    else:
        step, moments = torch.zeros_like(step), [torch.zeros_like(moment) for moment in moments]
    new_weight, *rest = _apply(config, dim, gradient.index_select(dim, index), weight, hyper, index, step, moments)
    return (new_weight, index, *rest)


def carried(
    length: int, dim: int, old_index: Tensor, index: Tensor, step: Tensor, moments: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The state of the rows ``index``: rows that ``old_index`` already held keep theirs, the others start from zero.

    Args:
        length: number of rows of the weight along ``dim``.
        dim: the stored dimension that is indexed.
        old_index: ``int64[r]``, before the refresh.
        index: ``int64[r]``, after it.
        step: ``[r]``, updates that each row has had.
        moments: each ``[r, n]`` or ``[m, r]``.
    """
    rank = old_index.shape[0]
    slots = torch.arange(rank, device=index.device)
    slot_of = torch.full((length,), -1, dtype=torch.int64, device=index.device).index_put([old_index], slots)
    slot = slot_of.index_select(0, index)
    kept, slot = slot >= 0, slot.clamp(min=0)
    mask = kept.unsqueeze(1 - dim)
    moved = [torch.where(mask, moment.index_select(dim, slot), 0.0) for moment in moments]
    return torch.where(kept, step.index_select(0, slot), 0.0), moved


def _apply(
    config: SiteConfig,
    dim: int,
    compact_grad: Tensor,
    weight: Tensor,
    hyper: Tensor,
    index: Tensor,
    step: Tensor,
    moments: list[Tensor],
) -> tuple[Tensor, ...]:
    rule = config.rule
    numbers = dict(zip((*rule.hyper_names, DECAY), hyper.unbind(), strict=True))
    step = step + 1
    state = dict(zip(rule.state_names, moments, strict=True))
    counted = step.to(moments[0].dtype)
    state["step"] = counted.unsqueeze(1 - dim) if step.dim() else counted
    update, new_state = rule.update(compact_grad.to(moments[0].dtype), state, numbers)
    if config.scale != 1.0:
        update = update * config.scale
    if config.decays:
        weight = (weight * numbers[DECAY]).to(weight.dtype)
    return (row_update(weight, dim, index, -update), step, *(new_state[name] for name in rule.state_names))

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

SHARED_HYPER = ("decay", "step")
"""The last elements of ``hyper``: ``1 - lr * weight_decay``, the factor on the whole weight; and, where all rows of a weight
have had equally many updates, their number, this one included. Weights that share it share all that follows from it."""


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
        hyper: ``[len(rule.hyper_names) + len(SHARED_HYPER)]``.
        *state: as named by `graph_state`.

    Returns:
        weight, and what is left of the state after ``index``, all new.
    """
    index, *rest = state
    return _apply(config, dim, compact_grad, weight, hyper, index, rest)


def refresh_step(
    config: SiteConfig, dim: int, rank: int, gradient: Tensor, weight: Tensor, hyper: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """A step that first chooses new rows from the full gradient, then resets or carries the state.

    Args:
        gradient: ``[m, n]``, full; everything else as in `regular_step`.

    Returns:
        weight, and the state as named by `graph_state`, all new.
    """
    old_index, *rest = state
    index = selection.top(selection.scores(gradient, dim), rank)
    if config.on_refresh == "carry":
        rest = carried(gradient.shape[dim], dim, old_index, index, rest)
    else:
        rest = [torch.zeros_like(moment) for moment in rest]
    new_weight, *rest = _apply(config, dim, gradient.index_select(dim, index), weight, hyper, index, rest)
    return (new_weight, index, *rest)


def graph_state(config: SiteConfig) -> tuple[str, ...]:
    """The state tensors of one weight that are inputs of the graph, in their order there.

    ``step`` is among them only where it is kept per row; otherwise it comes with ``hyper``.
    """
    return ("index", *(("step",) if config.on_refresh == "carry" else ()), *config.rule.state_names)


def carried(length: int, dim: int, old_index: Tensor, index: Tensor, state: list[Tensor]) -> list[Tensor]:
    """The state of the rows ``index``: rows that ``old_index`` already held keep theirs, the others start from zero.

    Args:
        length: number of rows of the weight along ``dim``.
        dim: the stored dimension that is indexed.
        old_index: ``int64[r]``, before the refresh.
        index: ``int64[r]``, after it.
        state: ``step`` ``[r]``, then tensors ``[r, n]`` or ``[m, r]``.
    """
    slots = torch.arange(old_index.shape[0], device=index.device)
    slot_of = torch.full((length,), -1, dtype=torch.int64, device=index.device).index_put([old_index], slots)
    slot = slot_of.index_select(0, index)
    kept, slot = slot >= 0, slot.clamp(min=0)
    step, *moments = state
    mask = kept.unsqueeze(1 - dim)
    return [
        torch.where(kept, step.index_select(0, slot), 0.0),
        *(torch.where(mask, moment.index_select(dim, slot), 0.0) for moment in moments),
    ]


def _apply(
    config: SiteConfig,
    dim: int,
    compact_grad: Tensor,
    weight: Tensor,
    hyper: Tensor,
    index: Tensor,
    state: list[Tensor],
) -> tuple[Tensor, ...]:
    rule = config.rule
    numbers = dict(zip((*rule.hyper_names, *SHARED_HYPER), hyper.unbind(), strict=True))
    written = []
    step = numbers["step"]
    if config.on_refresh == "carry":
        counted, *state = state
        written = [counted + 1]
        step = written[0].to(hyper.dtype).unsqueeze(1 - dim)
    named = dict(zip(rule.state_names, state, strict=True))
    update, new = rule.update(compact_grad.to(state[0].dtype), {**named, "step": step}, numbers)
    if config.scale != 1.0:
        update = update * config.scale
    if config.decays:
        weight = (weight * numbers["decay"]).to(weight.dtype)
    return (row_update(weight, dim, index, -update), *written, *(new[name] for name in rule.state_names))

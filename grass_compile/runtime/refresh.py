"""What a refresh does to one weight: choose new rows from the full gradient, and reset or carry the compact state.

This runs eagerly, as one operator of the compiled backward (`grass_compile.runtime.ops.refresh`): it is a handful of
small kernels every ``update_proj_gap`` steps, so generated code would gain nothing and cost a kernel per weight to compile.
What comes out feeds the same traced step as on any other day. Being opaque, it also keeps Inductor from fusing the refreshes
of several weights, which would keep all their full gradients alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import selection


def refresh(
    gradient: Tensor, index: Tensor, state: Sequence[Tensor], dim: int, rank: int, on_refresh: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Choose new rows.

    Args:
        gradient: ``[m, n]``, full.
        index: ``int64[r]``, of the last refresh.
        state: with ``carry``, ``step`` ``[r]`` first; then the rule's state, ``[r, n]`` or ``[m, r]``.
        dim: the stored dimension that is indexed.
        rank: r.
        on_refresh: ``reset`` or ``carry``.

    Returns:
        The compact gradient, the new index and the state that belongs to it, all new tensors.
    """
    chosen = selection.top(selection.scores(gradient, dim), rank)
    if on_refresh == "carry":
        rest = carried(gradient.shape[dim], dim, index, chosen, state)
    else:
        rest = [torch.zeros_like(moment) for moment in state]
    return gradient.index_select(dim, chosen), chosen, rest


def carried(length: int, dim: int, old_index: Tensor, index: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
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

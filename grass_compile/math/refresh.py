"""A refresh of one weight: choose new rows from the full gradient, and reset or carry the compact state.

This runs eagerly, as one operator of the compiled backward (`grass_compile.ops.refresh`): it is a handful of
small kernels every ``update_proj_gap`` steps, so generated code would gain nothing and cost a kernel per weight to compile.
Its results feed the same traced step as on a regular step. Being opaque, it also keeps Inductor from fusing the refreshes
of several weights, which would keep all their full gradients alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import projection, selection
from .finite import is_finite


def refresh(
    gradient: Tensor,
    index: Tensor,
    noise: Tensor | None,
    state: Sequence[Tensor],
    dim: int,
    rank: int,
    on_refresh: str,
    chosen_by: str,
    layouts: str,
    checked: bool,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Choose new rows.

    Args:
        gradient: ``[m, n]``, full, or a part of it along the dimension that is not indexed.
        index: ``int64[r]``, of the last refresh; with ``galore``, the basis.
        noise: ``[m]``, uniform in (0, 1), where rows are drawn.
        state: with ``carry``, ``step`` ``[r]`` first; then the rule's state.
        dim: the stored dimension that is indexed.
        rank: r.
        on_refresh: ``reset``, ``carry`` or ``keep``.
        chosen_by: the selection, or ``galore``.
        layouts: what each tensor of ``state`` has a number for, see `settled`.
        checked: whether a gradient that is not sound chooses nothing.
        scores: ``[m]``, of the rows, if the gradient is a part of that which they are chosen by.

    Returns:
        The compact gradient, the new index and the state that belongs to it, all new tensors. If nothing is chosen: NaN, the old
        index and the old state.
    """
    scores = selection.scores(gradient, dim) if scores is None else scores
    kind = "grass"
    if chosen_by == "galore":
        kind, chosen = "galore", projection.singular_vectors(gradient, dim, rank)
    else:
        chosen = selection.select(chosen_by, scores, noise, rank)
    new = settled(on_refresh, layouts, gradient.shape[dim], dim, index, chosen, state)
    compact = projection.selected(kind, dim, rank, gradient, chosen)
    if not checked:
        return compact, chosen, new
    ok = is_finite(scores)
    new = [torch.where(ok, fresh, old) for fresh, old in zip(new, state, strict=True)]
    return torch.where(ok, compact, torch.nan), torch.where(ok, chosen, index), new


def settled(
    on_refresh: str, layouts: str, length: int, dim: int, old_index: Tensor, index: Tensor, state: Sequence[Tensor]
) -> list[Tensor]:
    """The state that goes with new rows.

    Args:
        on_refresh: ``reset``: zero; ``keep``: slot by slot that of the old rows; ``carry``: rows that ``old_index`` already
            held keep theirs, the others start from zero.
            (A dense projection has no rows, so it has no ``carry``.)
        layouts: for each tensor of ``state``, ``f`` (full), ``s`` (of each selected row) or ``o`` and ``w`` (of each other
            feature or of the weight as a whole, which rows have in common).
        length: number of rows of the weight along ``dim``.
        dim: the stored dimension that is indexed.
        old_index: ``int64[r]``, before the refresh.
        index: ``int64[r]``, after it.
        state: tensors ``[r, n]`` or ``[m, r]``; ``[r]`` or ``[r, width]``; and of any shape.
    """
    if on_refresh == "reset":
        return [torch.zeros_like(tensor) for tensor in state]
    if on_refresh == "keep":
        return [tensor.clone() for tensor in state]
    slots = torch.arange(old_index.shape[0], device=index.device)
    slot_of = torch.full((length,), -1, dtype=torch.int64, device=index.device).index_put([old_index], slots)
    slot = slot_of.index_select(0, index)
    kept, slot = slot >= 0, slot.clamp(min=0)

    def carried(layout: str, tensor: Tensor) -> Tensor:
        if layout in "ow":
            return tensor.clone()
        along = 0 if layout == "s" else dim
        mask = kept if tensor.dim() == 1 else kept.unsqueeze(1 - along)
        return torch.where(mask, tensor.index_select(along, slot), torch.zeros((), dtype=tensor.dtype, device=tensor.device))

    return [carried(layout, tensor) for layout, tensor in zip(layouts, state, strict=True)]

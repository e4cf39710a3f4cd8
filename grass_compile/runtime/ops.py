"""The operators that PyTorch lacks.

``row_update`` adds an update to distinct rows or columns of a weight, rounding once.

``aten.index_put(weight, [idx], update, accumulate=True)`` would be an atomic add in the weight's dtype on a GPU, and
``index_put(weight, idx, weight[idx] + update)`` is two kernels with an ``r x n`` buffer between them. The selected rows are
distinct, so a plain read-modify-write is right; it adds in the precision of ``update`` and rounds to the weight's dtype once.

It is functional, for the joint graph; ``row_update_`` writes, for the backward graph after partitioning.
Inductor lowers the latter to one loop that is fused with the computation of ``update``.

``refresh`` makes one operator of `grass_compile.runtime.refresh`, which says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _torch
from .refresh import refresh as choose_anew

_library = torch.library.Library("grass_compile", "DEF")
_library.define("row_update(Tensor weight, int dim, Tensor index, Tensor update) -> Tensor")
_library.define("row_update_(Tensor(a!) weight, int dim, Tensor index, Tensor update) -> ()")


def _updated_rows(weight: Tensor, dim: int, index: Tensor, update: Tensor) -> Tensor:
    return (weight.index_select(dim, index).to(update.dtype) + update).to(weight.dtype)


def _row_update(weight: Tensor, dim: int, index: Tensor, update: Tensor) -> Tensor:
    return weight.index_copy(dim, index, _updated_rows(weight, dim, index, update))


def _row_update_(weight: Tensor, dim: int, index: Tensor, update: Tensor) -> None:
    weight.index_copy_(dim, index, _updated_rows(weight, dim, index, update))


_library.impl("row_update", _row_update, "CompositeExplicitAutograd")
_library.impl("row_update_", _row_update_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::row_update", lambda weight, dim, index, update: torch.empty_like(weight))
torch.library.register_fake("grass_compile::row_update_", lambda weight, dim, index, update: None)

row_update = torch.ops.grass_compile.row_update.default
"""``row_update(weight [m, n], dim, index int64[r], update [r, n] or [m, r]) -> [m, n]``; ``index`` must be distinct."""

row_update_ = torch.ops.grass_compile.row_update_.default
"""The same in place."""

_torch.register_row_update_lowering(row_update_)


# ---------------------------------------------------------------------------------------------------------------- refresh

_library.define("refresh(Tensor gradient, Tensor index, Tensor[] state, int dim, int rank, str on_refresh) -> Tensor[]")


def _refresh(gradient: Tensor, index: Tensor, state: Sequence[Tensor], dim: int, rank: int, on_refresh: str) -> list[Tensor]:
    compact, chosen, rest = choose_anew(gradient, index, state, dim, rank, on_refresh)
    return [compact, chosen, *rest]


def _fake_refresh(gradient: Tensor, index: Tensor, state: Sequence[Tensor], dim: int, rank: int, on_refresh: str) -> list[Tensor]:
    shape = list(gradient.shape)
    shape[dim] = rank
    return [gradient.new_empty(shape), torch.empty_like(index), *(torch.empty_like(tensor) for tensor in state)]


_library.impl("refresh", _refresh, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::refresh", _fake_refresh)

refresh = torch.ops.grass_compile.refresh.default
"""``refresh(gradient [m, n], index int64[r], state, dim, rank, on_refresh) -> [compact gradient, index, *state]``."""

"""``row_update`` adds an update to distinct rows or columns of a weight, rounding once; ``row_update_`` does it in place.

``aten.index_put(weight, [idx], update, accumulate=True)`` would be an atomic add in the weight's dtype on a GPU, and
``index_put(weight, idx, weight[idx] + update)`` is two kernels with an ``r x n`` buffer between them. The selected rows are
distinct, so a plain read-modify-write is right; it adds in the precision of ``update`` and rounds to the weight's dtype once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _inductor
from ..math.rounding import round_stochastically
from .library import library

library.define("row_update(Tensor weight, int dim, Tensor index, Tensor update, Tensor? noise=None) -> Tensor")
library.define("row_update_(Tensor(a!) weight, int dim, Tensor index, Tensor update, Tensor? noise=None) -> ()")


def _updated_rows(weight: Tensor, dim: int, index: Tensor, update: Tensor, noise: Tensor | None) -> Tensor:
    rows = weight.index_select(dim, index).to(update.dtype) + update
    return rows.to(weight.dtype) if noise is None else round_stochastically(rows, noise)


def _row_update(weight: Tensor, dim: int, index: Tensor, update: Tensor, noise: Tensor | None = None) -> Tensor:
    return weight.index_copy(dim, index, _updated_rows(weight, dim, index, update, noise))


def _row_update_(weight: Tensor, dim: int, index: Tensor, update: Tensor, noise: Tensor | None = None) -> None:
    weight.index_copy_(dim, index, _updated_rows(weight, dim, index, update, noise))


library.impl("row_update", _row_update, "CompositeExplicitAutograd")
library.impl("row_update_", _row_update_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::row_update", lambda weight, *args: torch.empty_like(weight))
torch.library.register_fake("grass_compile::row_update_", lambda weight, *args: None)

row_update = torch.ops.grass_compile.row_update.default
"""``row_update(weight [m, n], dim, index int64[r], update [r, n] or [m, r], noise=None) -> [m, n]``; ``index`` must be distinct.

``noise``, whole numbers of 16 bits of the update's shape, rounds to bf16 stochastically."""

row_update_ = torch.ops.grass_compile.row_update_.default
"""The same in place."""


@_inductor.lowering(row_update_)
def _lower(weight: Any, dim: int, index: Any, update: Any, noise: Any = None) -> None:
    """One loop that loads, adds, rounds and stores: a scatter whose value reads the very element that it writes. Inductor's own
    ``index_put_`` may not do that, since it cannot know that the indices are distinct; ours are."""
    ops = _inductor.ops()
    weight.realize()
    length = weight.get_size()[dim]
    load_weight, load_index, load_update = weight.make_loader(), index.make_loader(), update.make_loader()
    wide, narrow = update.get_dtype(), weight.get_dtype()

    def target(position: Sequence[Any]) -> list[Any]:
        row = ops.indirect_indexing(load_index([position[dim]]), length, check=False, wrap_neg=False)
        return [row, position[1]] if dim == 0 else [position[0], row]

    def value(position: Sequence[Any]) -> Any:
        old = ops.to_dtype(load_weight(target(position)), wide)
        new = ops.add(old, load_update(position))
        if noise is not None:
            bits = ops.add(ops.to_dtype_bitcast(new, torch.int32, wide), noise.make_loader()(position))
            rounded = ops.bitwise_and(bits, ops.constant(-65536, torch.int32))
            finite = ops.lt(ops.abs(new), ops.constant(float("inf"), wide))
            new = ops.where(finite, ops.to_dtype_bitcast(rounded, wide, torch.int32), new)
        return ops.to_dtype(new, narrow)

    _inductor.scatter_(weight, value, list(update.get_size()), target)

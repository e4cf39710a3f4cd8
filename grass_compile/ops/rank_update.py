"""``rank_update`` adds the product of a basis and an update to a whole weight; ``rank_update_`` does it in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _inductor
from ..math.noise import rounding_noise
from ..math.rounding import round_stochastically
from .library import library

library.define("rank_update(Tensor weight, int dim, Tensor basis, Tensor update, Tensor? seed=None) -> Tensor")
library.define("rank_update_(Tensor(a!) weight, int dim, Tensor basis, Tensor update, Tensor? seed=None) -> ()")

ROUNDED_AT_A_TIME = 2**20
"""Elements of a weight that are rounded stochastically at a time: 4 MiB of sums in fp32, and 24 MiB of whole numbers."""


def _rank_update_(weight: Tensor, dim: int, basis: Tensor, update: Tensor, seed: Tensor | None = None) -> None:
    left, right = (update, basis.t()) if dim else (basis, update)
    if seed is None:
        weight.addmm_(left.to(weight.dtype), right.to(weight.dtype))
        return
    left, right = left.to(update.dtype), right.to(update.dtype)
    rows = max(1, ROUNDED_AT_A_TIME // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        part = weight[first : first + rows]
        moved = part.to(update.dtype).addmm_(left[first : first + rows], right)  # in place, so that autocast lets it be
        part.copy_(round_stochastically(moved, rounding_noise(part.shape, seed, first)))


def _rank_update(weight: Tensor, dim: int, basis: Tensor, update: Tensor, seed: Tensor | None = None) -> Tensor:
    moved = weight.clone()
    _rank_update_(moved, dim, basis, update, seed)
    return moved


library.impl("rank_update", _rank_update, "CompositeExplicitAutograd")
library.impl("rank_update_", _rank_update_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::rank_update", lambda weight, *args: torch.empty_like(weight))
torch.library.register_fake("grass_compile::rank_update_", lambda weight, *args: None)

rank_update = torch.ops.grass_compile.rank_update.default
"""``rank_update(weight [m, n], dim, basis [m, r] or [n, r], update [r, n] or [m, r], seed=None) -> [m, n]``: the weight plus
``basis update``, or ``update basis^T``.

``seed``, a whole number, rounds to bf16 stochastically."""

rank_update_ = torch.ops.grass_compile.rank_update_.default
"""The same in place: one matrix product that adds to the weight. Nothing else of the weight's size is made."""

_inductor.lower_as_write(rank_update_)

"""``refresh_`` makes one operator of `grass_compile.math.refresh`, which says why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autograd, _inductor
from ..math.refresh import refresh as choose_anew
from .journal import writing
from .library import library

library.define(
    "refresh_(Tensor gradient, Tensor(a!) index, Tensor? noise, Tensor(b!)[] state, int dim, int rank, str on_refresh, "
    "str selection, str layouts, bool checked, Tensor? scores=None) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # a decomposition waits for the device, and one step in a gap is not worth recording
)


def run_refresh(
    gradient: Tensor, index: Tensor, noise: Tensor | None, state: Sequence[Tensor], dim: int, rank: int, *how: Any
) -> Tensor:
    """Refresh by the operators that it is made of, as ``refresh_`` does."""
    compact, chosen, rest = choose_anew(gradient, index, noise, state, dim, rank, *how)
    with writing(index, "refreshed"), _autograd.unversioned((index, *state)):
        index.copy_(chosen)
        for old, new in zip(state, rest, strict=True):
            old.copy_(new)
    return compact


def _fake_refresh_(
    gradient: Tensor, index: Tensor, noise: Tensor | None, state: Sequence[Tensor], dim: int, rank: int, *how: Any
) -> Tensor:
    shape = list(gradient.shape)
    shape[dim] = rank
    return gradient.new_empty(shape)


library.impl("refresh_", run_refresh, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::refresh_", _fake_refresh_)

refresh_ = torch.ops.grass_compile.refresh_.default
"""``refresh_(gradient [m, n], index int64[r], noise, state, dim, rank, on_refresh, selection, layouts, checked, scores)``
returns the compact gradient of the rows that it has chosen; ``index`` and ``state`` are written. With the selection ``galore``,
``index`` is a basis, ``[m, r]``. Without ``scores`` ``[m]``, they are those of the gradient."""

_inductor.lower_as_write(refresh_)

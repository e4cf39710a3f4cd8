"""The operators that PyTorch lacks.

``row_update`` adds an update to distinct rows or columns of a weight, rounding once.

``aten.index_put(weight, [idx], update, accumulate=True)`` would be an atomic add in the weight's dtype on a GPU, and
``index_put(weight, idx, weight[idx] + update)`` is two kernels with an ``r x n`` buffer between them. The selected rows are
distinct, so a plain read-modify-write is right; it adds in the precision of ``update`` and rounds to the weight's dtype once.

It is functional, for tracing; ``row_update_`` writes. Inductor lowers the latter to one loop that is fused with the computation
of ``update``.

``rank_update`` and ``rank_update_`` do the same to the whole weight, with the product of a basis and an update.

``step_`` runs the compiled step of one weight inside a backward graph (`grass_compile.passes.kernel` says why it is not inlined).

``refresh_`` makes one operator of `grass_compile.runtime.refresh`, which says why.

``anchor`` stands in the joint graph for all that may happen to one weight gradient in the backward. It ties what that needs to
the backward while the partitioner runs, and is replaced afterwards (`grass_compile.passes.fuse`); it never runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _inductor, _torch
from . import cpu
from .noise import rounding_noise
from .refresh import refresh as choose_anew

_library = torch.library.Library("grass_compile", "DEF")
_library.define("row_update(Tensor weight, int dim, Tensor index, Tensor update, Tensor? noise=None) -> Tensor")
_library.define("row_update_(Tensor(a!) weight, int dim, Tensor index, Tensor update, Tensor? noise=None) -> ()")


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the expectation exact; infinities and NaN stay.

    Args:
        value: fp32.
        noise: whole numbers of 16 bits, ``int32``.
    """
    rounded = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def _updated_rows(weight: Tensor, dim: int, index: Tensor, update: Tensor, noise: Tensor | None) -> Tensor:
    rows = weight.index_select(dim, index).to(update.dtype) + update
    return rows.to(weight.dtype) if noise is None else round_stochastically(rows, noise)


def _row_update(weight: Tensor, dim: int, index: Tensor, update: Tensor, noise: Tensor | None = None) -> Tensor:
    return weight.index_copy(dim, index, _updated_rows(weight, dim, index, update, noise))


def _row_update_(weight: Tensor, dim: int, index: Tensor, update: Tensor, noise: Tensor | None = None) -> None:
    weight.index_copy_(dim, index, _updated_rows(weight, dim, index, update, noise))


_library.impl("row_update", _row_update, "CompositeExplicitAutograd")
_library.impl("row_update_", _row_update_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::row_update", lambda weight, *args: torch.empty_like(weight))
torch.library.register_fake("grass_compile::row_update_", lambda weight, *args: None)

row_update = torch.ops.grass_compile.row_update.default
"""``row_update(weight [m, n], dim, index int64[r], update [r, n] or [m, r], noise=None) -> [m, n]``; ``index`` must be distinct.

``noise``, whole numbers of 16 bits of the update's shape, rounds to bf16 stochastically."""

row_update_ = torch.ops.grass_compile.row_update_.default
"""The same in place."""

_inductor.register_row_update_lowering(row_update_)


# ------------------------------------------------------------------------------------------------------------ rank update

_library.define("rank_update(Tensor weight, int dim, Tensor basis, Tensor update, Tensor? seed=None) -> Tensor")
_library.define("rank_update_(Tensor(a!) weight, int dim, Tensor basis, Tensor update, Tensor? seed=None) -> ()")

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


_library.impl("rank_update", _rank_update, "CompositeExplicitAutograd")
_library.impl("rank_update_", _rank_update_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::rank_update", lambda weight, *args: torch.empty_like(weight))
torch.library.register_fake("grass_compile::rank_update_", lambda weight, *args: None)

rank_update = torch.ops.grass_compile.rank_update.default
"""``rank_update(weight [m, n], dim, basis [m, r] or [n, r], update [r, n] or [m, r], seed=None) -> [m, n]``: the weight plus
``basis update``, or ``update basis^T``.

``seed``, a whole number, rounds to bf16 stochastically."""

rank_update_ = torch.ops.grass_compile.rank_update_.default
"""The same in place: one matrix product that adds to the weight. Nothing else of the weight's size is made."""

IN_PLACE = {row_update: row_update_, rank_update: rank_update_}
"""The twins that write."""


# ----------------------------------------------------------------------------------------------------------------- gather

_library.define("gather(Tensor[] features, Tensor[] index) -> Tensor")


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is in a CPU's memory, where gathers and products want other layouts than on a GPU."""
    return tensor.device.type == "cpu"


def _gather(features: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    pairs = zip(features, index, strict=True)
    if on_cpu(features[0]):  # `index_select` runs on one thread only
        return torch.cat([x.t().gather(0, rows.unsqueeze(1).expand(-1, x.shape[0])) for x, rows in pairs]).t()
    return torch.cat([x.gather(1, rows.expand(x.shape[0], -1)) for x, rows in pairs], 1)


def _gather_fake(features: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    tokens, rank = features[0].shape[0], sum(rows.shape[0] for rows in index)
    if on_cpu(features[0]):
        return features[0].new_empty((rank, tokens)).t()
    return features[0].new_empty((tokens, rank))


_library.impl("gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::gather", _gather_fake)

gather = torch.ops.grass_compile.gather.default
"""``gather([features [b, m]], [index int64[r]]) -> [b, r]``; ``index`` must be in range. Of several, the results side by side.

On a GPU token after token, so that neighbouring threads read neighbouring memory. On a CPU feature after feature, so that the
product of the transposed takes it as it is: oneDNN needs up to 1.5 times as long with a transposed operand in bf16."""

_library.define("gather_on_cpu(Tensor[] features, Tensor[] index) -> Tensor")
_library.impl("gather_on_cpu", cpu.gather, "CPU")
torch.library.register_fake("grass_compile::gather_on_cpu", _gather_fake)

_inductor.register_gather_lowering(gather, torch.ops.grass_compile.gather_on_cpu.default)


# ------------------------------------------------------------------------------------------------------------- contiguous

_library.define("contiguous(Tensor matrix) -> Tensor")
_library.impl("contiguous", lambda matrix: matrix.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::contiguous", lambda matrix: matrix.new_empty(matrix.shape))

contiguous = torch.ops.grass_compile.contiguous.default
"""A copy of a matrix in row-major order. Not a loop of Inductor's: the C++ of a transposition takes long to compile."""

_library.define("contiguous_on_cpu(Tensor matrix) -> Tensor")
_library.impl("contiguous_on_cpu", cpu.contiguous, "CPU")
torch.library.register_fake("grass_compile::contiguous_on_cpu", lambda matrix: matrix.new_empty(matrix.shape))

_inductor.register_contiguous_lowering(contiguous, torch.ops.grass_compile.contiguous_on_cpu.default)


# ------------------------------------------------------------------------------------------------------------------- once

_library.define("once(Tensor value) -> Tensor")
_library.impl("once", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::once", torch.empty_like)


def once(value: Tensor) -> Tensor:
    """``value``, computed once rather than for every element that it is broadcast to.

    For what a rule derives from its numbers or from the step counts of rows: inlined in a loop over ``r x n`` elements, an
    ``expm1`` there costs a CPU more than all the rest of the step.
    """
    computed: Tensor = torch.ops.grass_compile.once.default(value)
    return computed


_inductor.register_once_lowering(torch.ops.grass_compile.once.default)


# ---------------------------------------------------------------------------------------------------------------- refresh

_library.define(
    "refresh_(Tensor gradient, Tensor(a!) index, Tensor? noise, Tensor(b!)[] state, int dim, int rank, str on_refresh, "
    "str selection, int block, bool replacement, str layouts, bool checked) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # a decomposition waits for the device, and one step in a gap is not worth recording
)


def _refresh_(
    gradient: Tensor, index: Tensor, noise: Tensor | None, state: Sequence[Tensor], dim: int, rank: int, *how: Any
) -> Tensor:
    compact, chosen, rest = choose_anew(gradient, index, noise, state, dim, rank, *how)
    with _torch.unversioned((index, *state)):
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


_library.impl("refresh_", _refresh_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::refresh_", _fake_refresh_)

refresh_ = torch.ops.grass_compile.refresh_.default
"""``refresh_(gradient [m, n], index int64[r], noise, state, dim, rank, on_refresh, selection, block, replacement, layouts,
checked)`` returns the compact gradient of the rows that it
has chosen; ``index`` and ``state`` are written. With the selection ``galore``, ``index`` is a basis, ``[m, r]``."""


# ------------------------------------------------------------------------------------------------------------------- step

_library.define("step_(Tensor gradient, Tensor(a!) weight, Tensor hyper, Tensor selector, Tensor(b!)[] state, str kernel) -> ()")

kernels: dict[str, Callable[..., None]] = {}
"""Compiled steps by name; each takes ``(gradient, weight, hyper, selector, *state)``. Filled by the backend."""


def _step_(gradient: Tensor, weight: Tensor, hyper: Tensor, selector: Tensor, state: Sequence[Tensor], kernel: str) -> None:
    kernels[kernel](gradient, weight, hyper, selector, *state)


_library.impl("step_", _step_, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::step_", lambda *args: None)

step_ = torch.ops.grass_compile.step_.default
"""``step_(gradient [r, n] or [m, r], weight [m, n], hyper, selector, state, kernel)`` moves the weight and its state."""


# ----------------------------------------------------------------------------------------------------------------- anchor

_library.define(
    "anchor(Tensor gradient, Tensor weight, Tensor hyper, Tensor[] state, Tensor? energy, int[] shape, int number) -> Tensor"
)


def _fake_anchor(
    gradient: Tensor,
    weight: Tensor,
    hyper: Tensor,
    state: Sequence[Tensor],
    energy: Tensor | None,
    shape: Sequence[int],
    number: int,
) -> Tensor:
    return gradient.new_empty(shape, dtype=torch.promote_types(gradient.dtype, torch.float32))


torch.library.register_fake("grass_compile::anchor", _fake_anchor)

anchor = torch.ops.grass_compile.anchor.default
"""``anchor(gradient, weight, hyper, state, energy, shape, number)``; what new rows are proposed by, if they are; the shape of the
compact gradient, the number of the projection."""

_library.define("norm(Tensor[] anchors, Tensor[] gradients) -> Tensor")
torch.library.register_fake("grass_compile::norm", lambda anchors, gradients: anchors[0].new_empty(()))

norm = torch.ops.grass_compile.norm.default
"""``norm(anchors, gradients)``; stands for the common norm of compact and dense gradients, by which all are clipped."""

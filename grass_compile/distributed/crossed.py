"""Weights that ``fully_shard`` and tensor parallelism shard along different dimensions: by default, `RowwiseParallel` ones.

Rows are selected along the dimension that FSDP2 shards (columns, if that is the second one), since of the other each rank has
the gradient of a part alone. A rank may own any number of the selected rows, so their gradients and moments are not laid out as
the weight is: each rank of FSDP2's group takes an equal part of the features of *every* selected row. It gets the mean of that
part by a reduce-scatter and steps it; an all-gather hands each rank the update of all features, which it adds to the rows that
it owns. For a weight ``[m, n]`` in ``N x T`` parts::

    weight:               [m / N, n / T]
    compact gradient:     [r, n / T]        of this rank's tokens
    its mean, the state:  [r, n / T / N]
    update:               [r, n / T]        gathered, of which rows outside of m / N are left out

The numbers are those of one process, and what is sent is what an all-reduce of the compact gradient sends.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _fsdp
from ..errors import StateError
from .collectives import c10d
from .layout import Crossed, Layout, MeshDim, is_sharded, local_part


def spread(whole: Layout, part: Tensor, found: _fsdp.Gathered) -> tuple[Crossed, int, bool]:
    """How FSDP2 spreads a weight whose other dimension is tensor-parallel.

    Args:
        whole: how tensor parallelism spreads it.
        part: what a compiled region reads, ``[m, n / T]``.
        found: what FSDP2 knows of it.

    Returns:
        What this rank has; the longest part of the features; and whether some ranks have none, or own no row.
    """
    dim, size, rank = found.shard_dim, found.shard_size, found.shard_rank
    features, rows = part.shape[1 - dim], -(-part.shape[dim] // size)
    padded, own = _own(features, size, rank)
    total, shared = found.parameter.shape[1 - dim], math.prod(over.size for over in whole.mesh)
    least = total - (shared - 1) * whole.widest  # the fewest features that any region reads
    empty = _leaves_out(part.shape[dim], size) or any(_leaves_out(length, size) for length in (whole.widest, least))
    return Crossed(_with(part.shape, 1 - dim, own), rank * rows), padded, empty


def part_of_gradient(parameter: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of this rank's part of the gradient and of full moments: what it owns of the
    weight, unless that is crossed, and then one without storage of its own."""
    part = local_part(parameter)
    if (at := _crosses(parameter)) is None:
        return part
    sharded: Any = parameter
    dim, mesh = sharded.placements[at].dim, sharded.device_mesh
    _, own = _own(part.shape[1 - dim], mesh.size(at), mesh.get_local_rank(at))
    shape = _with(parameter.shape, 1 - dim, own)
    return torch.empty((), dtype=part.dtype, device=part.device).expand(shape)


def placements(parameter: Tensor) -> Any:
    """How a ``DTensor`` of the gradient's shape is spread, or one of full moments."""
    sharded: Any = parameter
    if (at := _crosses(parameter)) is None:
        return sharded.placements
    over = math.prod(sharded.device_mesh.size(other) for other in range(at + 1, sharded.device_mesh.ndim))
    strided = _fsdp.strided(1 - sharded.placements[at].dim, over)
    return (*sharded.placements[:at], strided, *sharded.placements[at + 1 :])


def selected_dim(parameter: Tensor) -> int | None:
    """The dimension along which rows of a crossed weight are selected; None for any other."""
    at = _crosses(parameter)
    sharded: Any = parameter
    return None if at is None else sharded.placements[at].dim


def rows_of(weight: Tensor, dim: int, index: Tensor, layout: Layout) -> Tensor:
    """This rank's part of the features of the selected rows of a weight, ``[r, n / T / N]``; all ranks have to call this."""
    assert layout.crossed is not None and layout.scatters is not None
    place = index - layout.crossed.start
    inside = (place >= 0) & (place < weight.shape[dim])
    rows = weight.index_select(dim, place.clamp(0, weight.shape[dim] - 1))
    mine = torch.where(inside.unsqueeze(1 - dim), rows, 0.0)  # those of others are zero here
    features = _features_first(mine, dim)
    padded = F.pad(features, (0, 0, 0, layout.padded * layout.scatters.size - features.shape[0])).contiguous()
    sent = c10d.reduce_scatter_tensor(padded, "sum", layout.scatters.size, layout.scatters.group)
    return _features_first(c10d.wait_tensor(sent)[: layout.crossed.shape[1 - dim]], dim)


def update_of_owned(weight: Tensor, dim: int, index: Tensor, update: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The update of the rows that this rank owns, from those of a part of the features; all ranks have to call this.

    Args:
        weight: what this rank owns, ``[m / N, n / T]``.
        dim: the dimension along which rows are selected.
        index: ``int64[r]``, of all ranks' rows.
        update: ``[r, n / T / N]``.
        layout: how the weight is spread.

    Returns:
        The update, of the shape of ``weight``, and which of its rows are selected, ``bool[m / N, 1]``; in others it is anything.
    """
    whole = gathered(update, dim, weight.shape[1 - dim], layout)
    rank, length = index.shape[0], weight.shape[dim]
    assert layout.crossed is not None
    place = index - layout.crossed.start
    place = torch.where((place >= 0) & (place < length), place, length)  # one place more, for those of other ranks
    numbers = torch.arange(rank, device=index.device)
    position = torch.full([length + 1], rank, dtype=index.dtype, device=index.device).index_put([place], numbers)[:length]
    return whole.index_select(dim, position.clamp(max=rank - 1)), (position < rank).unsqueeze(1 - dim)


def gathered(part: Tensor, dim: int, features: int, layout: Layout) -> Tensor:
    """All features, of which each rank of FSDP2's group has a part."""
    over: MeshDim | None = layout.scatters
    assert over is not None
    mine = _features_first(part, dim)
    mine = F.pad(mine, (0, 0, 0, layout.padded - mine.shape[0])).contiguous()
    sent = c10d.all_gather_into_tensor(mine, over.size, over.group)
    return _features_first(c10d.wait_tensor(sent)[:features], dim)


WHY = "fully_shard and tensor parallelism shard it along different dimensions"


def refused_outside(name: str) -> StateError:
    """The error for a gradient that comes from outside of the compiled regions that read a crossed weight."""
    return StateError(
        f"{name}: {WHY}, so a gradient of it is projected only inside of compiled regions, and this one comes from outside. "
        f"{INSTEAD}"
    )


def refused_reading(name: str) -> StateError:
    """The error for a script that reads the gradient of a crossed weight."""
    return StateError(
        f"{name}: {WHY}. Of its gradient each rank has a part of the features of all selected rows, rather than the rows that it "
        f"owns, so it cannot be read. {INSTEAD}"
    )


INSTEAD = (
    "Shard both along one dimension, by fully_shard(..., shard_placement_fn=...) (docs/distributed.md shows it), or keep the "
    "weight dense with exclude=."
)


def _features_first(matrix: Tensor, dim: int) -> Tensor:
    """A matrix with a row for each feature, and back."""
    return matrix if dim else matrix.t()


def _crosses(parameter: Tensor) -> int | None:
    """The dimension of the mesh over which FSDP2 has sharded a ``DTensor`` whose other dimension was sharded before; or None."""
    if not is_sharded(parameter) or parameter.dim() != 2:
        return None
    sharded: Any = parameter
    over = [(at, placement.dim) for at, placement in enumerate(sharded.placements) if getattr(placement, "dim", None) is not None]
    return over[0][0] if len(over) == 2 and over[0][1] != over[1][1] else None


def _own(features: int, size: int, rank: int) -> tuple[int, int]:
    """How many features the longest part has, and this rank's."""
    padded = -(-features // size)
    return padded, max(0, min(padded, features - rank * padded))


def _leaves_out(length: int, size: int) -> bool:
    """Whether some of ``size`` ranks have nothing of ``length`` rows."""
    return (size - 1) * -(-length // size) >= length


def _with(shape: Any, dim: int, length: int) -> tuple[int, ...]:
    return tuple(length if at == dim else other for at, other in enumerate(shape))

"""Tensor parallelism (``parallelize_module``): each rank computes with a part of the weight and has the gradient of that part.

The parameter is a ``DTensor``, and so is the input of a compiled region. The region is traced with the local tensor in its place,
which ``DTensor.from_local`` makes whole in the graph, so that everything behind it sees an ordinary weight, and the backward
writes the part that this rank owns. No gradient is exchanged; where new rows are chosen by scores, the parts of these are.

Rows or columns are selected along the dimension that is not sharded: columns of a ``ColwiseParallel`` linear, rows of a
``RowwiseParallel`` one. So every rank has the same index, and its part of the moments belongs to its part of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _fsdp
from .layout import Layout, MeshDim


def layout_of(parameter: Tensor) -> Layout | None:
    """How a ``DTensor`` that compiled regions read is spread; None if it cannot be trained by parts."""
    spread: Any = parameter
    mesh = spread.device_mesh
    dims = [getattr(placement, "dim", None) if placement.is_shard() else None for placement in spread.placements]
    if mesh.ndim != 1 or dims[0] is None or type(spread.placements[0]).__name__ != "Shard":
        return None
    length, size = parameter.shape[dims[0]], mesh.size(0)
    widest = -(-length // size)
    over = MeshDim(_fsdp.group_of(mesh, 0), size, dims[0], averages=False)
    return Layout((over,), leaves_out_ranks=length - (size - 1) * widest < 2, widest=widest)


def whole_of(parameter: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """What makes a ``DTensor`` that is spread like ``parameter`` of the part that this rank owns, and of another ``DTensor`` on
    its mesh. It sends nothing."""
    spread: Any = parameter
    kind, placements, shape, stride = type(spread), spread.placements, spread.shape, spread.stride()

    def make_whole(part: Tensor, other: Any) -> Tensor:
        mesh = other.device_mesh
        return kind.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)  # type: ignore[no-any-return]

    return make_whole


def why_not(parameter: Tensor) -> str:
    """Why `layout_of` has none."""
    spread: Any = parameter
    placements = ", ".join(map(str, spread.placements))
    return f"it is a DTensor with placements ({placements}); one is projected only if all of it is sharded along one dimension"

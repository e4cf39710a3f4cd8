"""FSDP2 and HSDP (``fully_shard``): each rank owns a part of the weight and of its state, and gets the mean of its part of the
compact gradient by a reduce-scatter inside the backward.

A compiled region reads the whole weight, which FSDP2 gathers into a parameter of its own. The optimizer holds another, the
sharded one. The first call of a region finds out which belongs to which; from then on the record is found by either.
FSDP2 itself leaves a parameter alone that has no gradient.

Rows or columns are selected along the dimension that is not sharded. So every rank has the same index, and its part of the
moments belongs to its part of the weight. (Where tensor parallelism has sharded that one, see `crossed`.)
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _fsdp
from ..errors import ConfigError
from . import crossed
from .layout import Layout, MeshDim, is_sharded, local_part
from .tensor_parallel import layout_of as layout_of_dtensor


class Gatherings:
    """What FSDP2 has gathered; looked up once, when it is first asked for."""

    def __init__(self) -> None:
        self._found: dict[int, Any] | None = None

    def behind(self, parameter: Tensor) -> _fsdp.Gathered | None:
        """What FSDP2 knows of the sharded parameter of which ``parameter`` is the gathered whole; None if it is none."""
        if self._found is None:
            self._found = _fsdp.gathered()
        found = self._found.get(id(parameter))
        return None if found is None else _fsdp.described(*found)


def layout_of(label: str, found: _fsdp.Gathered, whole: Tensor) -> Layout | None:
    """How FSDP2 spreads a weight; None if it was a ``DTensor`` before that cannot be trained by parts.

    Args:
        label: the weight's name, for messages.
        found: what FSDP2 knows of it.
        whole: the gathered weight.

    Raises:
        ConfigError: FSDP2 was asked for something that is not supported.
    """
    check(label, found)
    tensor_parallel = layout_of_dtensor(whole) if is_sharded(whole) else Layout(())
    if tensor_parallel is None:
        return None
    dim = found.shard_dim if tensor_parallel.sharded_dim is None else tensor_parallel.sharded_dim
    mesh = [MeshDim(found.shard_group, found.shard_size, dim)]
    if found.replica_group is not None:
        mesh.append(MeshDim(found.replica_group, found.replica_size))
    part, whole = local_part(found.parameter), local_part(whole)
    if dim == found.shard_dim:
        has, (padded, empty) = None, _along(dim, found, whole, tensor_parallel)
    else:
        has, padded, empty = crossed.spread(tensor_parallel, whole, found)
    return Layout(
        mesh=(*mesh, *tensor_parallel.mesh),
        shape=tuple(part.shape),
        dtype=part.dtype,
        padded=padded,
        leaves_out_ranks=empty or tensor_parallel.leaves_out_ranks,
        reduce_dtype=found.reduce_dtype,
        widest=tensor_parallel.widest,
        crossed=has,
    )


def _along(dim: int, found: _fsdp.Gathered, whole: Tensor, tensor_parallel: Layout) -> tuple[int, bool]:
    """How long the longest part of a weight is, and whether some ranks have none."""
    total, shared = found.parameter.shape[dim], math.prod(over.size for over in tensor_parallel.mesh)
    widest = -(-total // shared)
    lengths = (widest, total - (shared - 1) * widest)  # the longest part that a region reads, and the shortest
    empty = any((found.shard_size - 1) * -(-length // found.shard_size) >= length for length in lengths)
    return -(-whole.shape[dim] // found.shard_size), empty


def check(label: str, found: _fsdp.Gathered) -> None:
    """Refuse what was asked of FSDP2 since.

    Raises:
        ConfigError: naming the weight, and what it is.
    """
    if what := _fsdp.unusual(found):
        raise ConfigError(f"{label}: fully_shard with {what} is not supported. Leave that out, or use another backend.")

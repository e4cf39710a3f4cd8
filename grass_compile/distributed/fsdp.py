"""FSDP2 and HSDP (``fully_shard``): each rank owns a part of the weight and of its state, and gets the mean of its part of the
compact gradient by a reduce-scatter inside the backward.

A compiled region reads the whole weight, which FSDP2 gathers into a parameter of its own. The optimizer holds another, the
sharded one. The first call of a region finds out which belongs to which; from then on the record is found by either.
FSDP2 itself leaves a parameter alone that has no gradient.

Rows or columns are selected along the dimension that is not sharded. So every rank has the same index, and its part of the
moments belongs to its part of the weight.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _fsdp
from ..errors import ConfigError
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
    """How FSDP2 spreads a weight; None if it was a ``DTensor`` before, with which FSDP2's sharding does not go here.

    Args:
        label: the weight's name, for messages.
        found: what FSDP2 knows of it.
        whole: the gathered weight.

    Raises:
        ConfigError: FSDP2 was asked for something that is not supported.
    """
    check(label, found)
    tensor_parallel = layout_of_dtensor(whole) if is_sharded(whole) else Layout(())
    if tensor_parallel is None or tensor_parallel.sharded_dim not in (None, found.shard_dim):
        return None
    part, whole = local_part(found.parameter), local_part(whole)
    mesh = [MeshDim(found.shard_group, found.shard_size, found.shard_dim)]
    if found.replica_group is not None:
        mesh.append(MeshDim(found.replica_group, found.replica_size))
    padded = -(-whole.shape[found.shard_dim] // found.shard_size)
    total, shared = found.parameter.shape[found.shard_dim], math.prod(dim.size for dim in tensor_parallel.mesh)
    least = total - (shared - 1) * -(-total // shared)  # the shortest part that a region reads
    empty = tensor_parallel.leaves_out_ranks or (found.shard_size - 1) * -(-least // found.shard_size) >= least
    mesh += tensor_parallel.mesh
    return Layout(tuple(mesh), tuple(part.shape), part.dtype, padded, empty, found.reduce_dtype, tensor_parallel.widest)


def check(label: str, found: _fsdp.Gathered) -> None:
    """Refuse what was asked of FSDP2 since.

    Raises:
        ConfigError: naming the weight, and what it is.
    """
    if what := _fsdp.unusual(found):
        raise ConfigError(f"{label}: fully_shard with {what} is not supported. Leave that out, or use another backend.")

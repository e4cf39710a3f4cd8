"""How a weight and its gradient are spread over processes, as part of what is compiled for it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _fsdp
from .collectives import c10d, summed


@dataclasses.dataclass(frozen=True)
class MeshDim:
    """One dimension of the mesh of ranks that train a weight.

    Attributes:
        group: the name of the process group, as functional collectives know it.
        size: how many ranks it has.
        shards: the stored dimension of which each rank owns a part; None if all of them have the same.
        averages: whether each rank has the gradient of a batch of its own, and the mean moves the weight. Under tensor
            parallelism all have the same batch, and each has the gradient of its part.
    """

    group: str
    size: int
    shards: int | None = None
    averages: bool = True


@dataclasses.dataclass(frozen=True)
class Crossed:
    """What a rank has of a weight that FSDP2 shards along the dimension along which rows are selected, see `crossed`.

    Attributes:
        shape: of its part of the gradient, and of full moments.
        start: the first of the rows that it owns.
    """

    shape: tuple[int, ...]
    start: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """A weight that several ranks train.

    Attributes:
        mesh: the dimensions of the mesh.
        shape: of the part that this rank owns, where compiled regions read the whole; None where they read what the rank owns.
        dtype: of that part, which may be another than that of the whole; None where they are the same.
        crossed: where the gradient and the state are spread otherwise than the weight; ``mesh`` and ``padded`` are then theirs.
        padded: how much of the sharded dimension each rank would own if all had the same, the last ones included.
        leaves_out_ranks: whether some ranks own no part of it, or one that is a single row.
        reduce_dtype: the dtype in which gradients are exchanged; None for their own.
        widest: under tensor parallelism, how much of the sharded dimension the largest part has that a region reads; or 0.
    """

    mesh: tuple[MeshDim, ...]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    padded: int = 0
    leaves_out_ranks: bool = False
    reduce_dtype: torch.dtype | None = None
    widest: int = 0
    crossed: Crossed | None = None

    def __str__(self) -> str:
        copies = [dim.size for dim in self.mesh if dim.shards is None]
        if not self.parts:
            return f"the same on {self.size} ranks"
        count = " x ".join(str(dim.size) for dim in self.parts)
        along = f"dimension {self.sharded_dim}"
        if self.crossed is not None:
            along = f"both dimensions, its state along {along}"
        return f"in {count} parts along {along}{f', {copies[0]} replicas of each' if copies else ''}"

    @property
    def parts(self) -> tuple[MeshDim, ...]:
        """The dimensions of the mesh over which the weight is sharded."""
        return tuple(dim for dim in self.mesh if dim.shards is not None)

    @property
    def scatters(self) -> MeshDim | None:
        """The dimension of the mesh whose ranks each get their part of the mean of a gradient of the whole, or None."""
        return next((dim for dim in self.parts if dim.averages), None)

    @property
    def part_of_gradient(self) -> tuple[int, ...] | None:
        """The shape of this rank's part of the gradient, where compiled regions read the whole weight."""
        return self.shape if self.crossed is None else self.crossed.shape

    @property
    def sharded_dim(self) -> int | None:
        """The stored dimension of the weight (of its gradient, if that is spread otherwise) that is sharded, or None."""
        return self.parts[0].shards if self.parts else None

    @property
    def averages(self) -> bool:
        """Whether ranks have batches of their own."""
        return any(dim.averages for dim in self.mesh)

    @property
    def size(self) -> int:
        """How many ranks have batches of their own."""
        return math.prod(dim.size for dim in self.mesh if dim.averages)

    @property
    def copies(self) -> int:
        """How many ranks have the same batch."""
        return math.prod(dim.size for dim in self.mesh if not dim.averages)

    def in_parts(self, dim: int, shape: Sequence[int]) -> Layout:
        """The same for a tensor of which every rank is to have a part of equal length along ``dim``, where each has the whole of
        the weight."""
        first, *rest = self.mesh
        padded = -(-shape[dim] // first.size)
        part = tuple(padded if at == dim else length for at, length in enumerate(shape))
        return dataclasses.replace(self, mesh=(dataclasses.replace(first, shards=dim), *rest), shape=part, padded=padded)

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over all ranks; all of them have to call this."""
        tensor.div_(self.size)
        for dim in self.mesh:
            c10d.wait_tensor(c10d.all_reduce_(tensor, "sum", dim.group))
        return tensor

    def norms(self, parts: Tensor) -> Tensor:
        """Norms of whole vectors, of which each rank knows those of its part; all ranks have to call this."""
        if not self.parts:
            return parts
        return summed(parts.square(), [dim.group for dim in self.parts]).sqrt()


def why_left_out(layout: Layout | None) -> str | None:
    """Why a weight that is spread so stays dense, or None."""
    if layout is None or not layout.leaves_out_ranks:
        return None
    return "there are so many ranks that some own none of it, or a single row"


def spread_not_finite(dim: MeshDim, parts: Sequence[Tensor]) -> None:
    """Make each tensor NaN of which another rank has a part that is not finite; all ranks of a group have to call this."""
    wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    flags = torch.stack([(part * part).sum() for part in wide]) * 0.0
    for part, flag in zip(parts, summed(flags, [dim.group]).unbind(), strict=True):
        part.add_(flag)


def anywhere(flags: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """For each parameter whether its flag is raised on any rank that owns a part of it; one that every rank has keeps its flag.

    Args:
        flags: ``bool``, one for each.
        parameters: those that the flags are about; all ranks have to give the same.
    """
    meshes: dict[Any, list[int]] = {}
    for number, parameter in enumerate(parameters):
        if is_sharded(parameter):
            meshes.setdefault(parameter.device_mesh, []).append(number)  # type: ignore[attr-defined]
    flags = flags.clone() if meshes else flags
    for mesh, numbers in meshes.items():
        groups = [_fsdp.group_of(mesh, dim) for dim in range(mesh.ndim)]
        flags[numbers] = summed(flags[numbers].to(torch.int32), groups) > 0
    return flags


def mesh_of(parameter: Tensor) -> tuple[MeshDim, ...]:
    """The dimensions of the mesh of a ``DTensor``, with what it shards over each."""
    spread: Any = parameter
    dims = range(spread.device_mesh.ndim)
    groups = [_fsdp.group_of(spread.device_mesh, at) for at in dims]
    shards = [getattr(placement, "dim", None) for placement in spread.placements]
    return tuple(MeshDim(groups[at], spread.device_mesh.size(at), shards[at]) for at in dims)


def averages(action: str, full: bool, syncs: bool) -> bool:
    """Whether a backward averages one gradient inside its graph, of a weight that is the same on all ranks.

    Args:
        action: what it does with it.
        full: whether that is the whole gradient.
        syncs: whether it averages what it can.
    """
    if full:  # what is chosen by; of what only adds to rows chosen before, these rows are averaged when it has arrived
        return action == "choose" or (syncs and action == "step")
    return syncs and action != "skip"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks by ``torch.distributed.tensor``."""
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def spread_differently(tensors: Sequence[Tensor]) -> bool:
    """Whether some of them are ``DTensor`` and others are not, or are of other meshes; torch's foreach operators refuse such."""
    return _dtensor() is not None and len({getattr(tensor, "device_mesh", None) for tensor in tensors}) > 1


def local_part(tensor: Tensor) -> Tensor:
    """The part of a ``DTensor`` that this rank owns, itself and not a view of it; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def part_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The part of a gradient that belongs to the part of a ``DTensor`` which this rank owns. If the gradient is spread in another
    way, all ranks have to call this."""
    mine: Any = gradient
    placements = parameter.placements  # type: ignore[attr-defined]
    if is_sharded(gradient) and mine.placements != placements:
        mine = mine.redistribute(placements=placements)
    return local_part(mine)


def placed_like(parameter: Tensor, part: Tensor) -> Tensor:
    """A ``DTensor`` that is spread as a parameter is, of which ``part`` is what this rank owns."""
    spec = parameter._spec  # type: ignore[attr-defined]
    with torch.no_grad():
        return _dtensor()(part, spec, requires_grad=False)  # type: ignore[no-any-return]


def placed_along(parameter: Tensor, placements: Any, part: Tensor, dim: int, length: int) -> Tensor:
    """A ``DTensor`` of the shape of a parameter but for ``length`` along ``dim``, spread over its mesh."""
    spread: Any = parameter
    shape = list(parameter.shape)
    shape[dim] = length
    whole = dict(run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))
    return _dtensor().from_local(part, spread.device_mesh, placements, **whole)  # type: ignore[no-any-return]


@functools.cache
def _dtensor() -> Any:
    """The class, or None where torch was built without it."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return DTensor


def sharded_by(parameter: Tensor) -> str | None:
    """The name of a wrapper whose parameters cannot be trained here, or None."""
    if hasattr(parameter, "_fsdp_flattened") or type(parameter).__name__ == "FlatParameter":
        return "FullyShardedDataParallel (FSDP1)"
    return None

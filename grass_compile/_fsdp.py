"""FSDP2 (``torch.distributed.fsdp.fully_shard``): which sharded parameter a gathered one belongs to, and how it is sharded; and
what else is private of meshes."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What FSDP2 knows of one parameter.

    Attributes:
        parameter: the sharded parameter, a ``DTensor``, as an optimizer holds it.
        shard_dim: the dimension that is sharded.
        shard_group: the name of the group that it is sharded over.
        shard_size: how many ranks that has.
        shard_rank: the place of this rank among them.
        replica_group: the name of the group that has the same part (HSDP), or None.
        replica_size: how many ranks that has.
        reduce_dtype: the dtype in which gradients are exchanged; None for their own.
        source: weak references to its group and to what FSDP2 keeps of it, where that stands.
    """

    parameter: Tensor
    shard_dim: int
    shard_group: str
    shard_size: int
    shard_rank: int
    replica_group: str | None
    replica_size: int
    reduce_dtype: torch.dtype | None
    source: Any


def gathered() -> dict[int, tuple[Any, Any]]:
    """Every parameter of this process that FSDP2 has gathered, with its group, by the ``id`` of what modules see."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    found = {}
    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        if isinstance(state, FSDPState):
            own: Any = state
            groups = own._fsdp_param_groups if hasattr(own, "_fsdp_param_groups") else [own._fsdp_param_group]
            for group in groups:
                for sharded in group.fsdp_params if group is not None else ():
                    if (whole := getattr(sharded, "_unsharded_param", None)) is not None:
                        found[id(whole)] = group, sharded
    return found


def unusual(found: Gathered) -> str:
    """What was asked of FSDP2 by now that we cannot follow, in words, or "". It may be asked at any time."""
    group, sharded = (reference() for reference in found.source)
    if group is None or sharded is None:  # the model is gone
        return ""
    asked = (
        ("a mesh without a dimension to shard over", getattr(sharded.mesh_info, "shard_mesh_dim", None) is None),
        ("CPUOffloadPolicy", sharded.offload_to_cpu),
        ("set_gradient_divide_factor()", getattr(group, "gradient_divide_factor", None) is not None),
        ("set_all_reduce_hook()", getattr(group, "_all_reduce_hook", None) is not None),
        ("set_reduce_scatter_unused_params()", getattr(group, "reduce_scatter_unused_params", False)),
    )
    return next((what for what, used in asked if used), "")


def described(group: Any, sharded: Any) -> Gathered:
    """What FSDP2 knows of one parameter; see `gathered`."""
    info, mesh = sharded.mesh_info, sharded.mesh_info.mesh
    at, copies = getattr(info, "shard_mesh_dim", None), getattr(info, "replicate_mesh_dim", None)
    return Gathered(
        parameter=sharded.sharded_param,
        shard_dim=sharded.fsdp_placement.dim,
        shard_group="" if at is None else group_of(mesh, at),
        shard_size=1 if at is None else mesh.size(at),
        shard_rank=0 if at is None else mesh.get_local_rank(at),
        replica_group=None if copies is None else group_of(mesh, copies),
        replica_size=1 if copies is None else mesh.size(copies),
        reduce_dtype=group.mp_policy.reduce_dtype,
        source=(weakref.ref(group), weakref.ref(sharded)),
    )


def group_of(mesh: Any, dim: int) -> str:
    """The name of the process group of a dimension of a mesh. While something is compiled, a mesh that torch remembers from an
    earlier one of the same ranks knows its groups by name only."""
    try:
        return mesh.get_group(dim).group_name  # type: ignore[no-any-return]
    except RuntimeError:
        return mesh._dim_group_names[dim]  # type: ignore[no-any-return]


def strided(dim: int, parts: int) -> Any:
    """The placement of a tensor that is sharded once more along a dimension which is in ``parts`` parts before."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim, split_factor=parts)

"""Sums over the ranks of process groups, by functional collectives, which compiled graphs may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

c10d = torch.ops._c10d_functional


def process_group(name: str) -> Any:
    """The process group that functional collectives know by this name."""
    functions: Any = torch.distributed.distributed_c10d
    return functions._resolve_process_group(name)


def members(name: str) -> tuple[int, ...]:
    """The global ranks of a process group. Two groups may have the same: torch takes meshes of equal ranks for one another, so a
    tensor may come to know its mesh by one that a script has made before."""
    return tuple(torch.distributed.get_process_group_ranks(process_group(name)))


def summed(tensor: Tensor, groups: Sequence[str]) -> Tensor:
    """The sum over the ranks of several groups, one after another: the same on all of them, bit for bit."""
    for name in groups:
        tensor = c10d.wait_tensor(c10d.all_reduce(tensor, "sum", name))
    return tensor


def summed_part(tensor: Tensor, name: str) -> Tensor:
    """This rank's part, along dimension 0, of the sum over the ranks of a group; parts are of equal length, with zeros behind."""
    ranks = process_group(name).size()
    whole = F.pad(tensor, (0, 0, 0, -tensor.shape[0] % ranks)).contiguous()
    return c10d.wait_tensor(c10d.reduce_scatter_tensor(whole, "sum", ranks, name))  # type: ignore[no-any-return]

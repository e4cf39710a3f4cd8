"""What all ranks have to have in common is compared when they first meet, in the first compiled forward.

A rank with another rank, seed or model would not fail: its weights would drift away from the others', or the group would hang in
a collective of another size. So each rank sees what every other has, and all of them raise, or none does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, StateError
from .collectives import process_group
from .layout import MeshDim

Facts = dict[str, Any]
"""What is compared, by what it is called in a message."""

SAME = "All ranks have to train the same model with the same optimizer."


def everyone(dim: MeshDim, mine: Any) -> list[Any]:
    """What each rank of a group has; all of them have to call this."""
    theirs: list[Any] = [None] * dim.size
    torch.distributed.all_gather_object(theirs, mine, group=process_group(dim.group))
    return theirs


def check_settings(mesh: Sequence[MeshDim], facts: Facts, seeds: tuple[int, ...], drawn: bool) -> tuple[int, ...]:
    """Compare the settings of an optimizer on all ranks.

    Args:
        mesh: the dimensions of the mesh. What is found along one is told along the next, so that all ranks raise, or none.
        facts: what has to be the same on all.
        seeds: of its random numbers.
        drawn: whether they were drawn rather than given.

    Returns:
        The seeds that all take: the first rank's if they were drawn.

    Raises:
        ConfigError: on all ranks, with the first difference.
    """
    error = ""
    for dim in mesh:
        theirs = everyone(dim, (facts, seeds, drawn, error))
        seeds, told = theirs[0][1], [other[3] for other in theirs if other[3]]
        error = told[0] if told else _difference(theirs)
    if error:
        raise ConfigError(error)
    return seeds


def _difference(theirs: Sequence[Any]) -> str:
    """The first difference between what ranks have, in words, or ""."""
    first, common, was_drawn, _ = theirs[0]
    for rank, (other, seeds_there, _, _) in enumerate(theirs):
        for name, value in other.items():
            if name in first and value != first[name]:
                return f"{name} is {first[name]} on rank 0 and {value} on rank {rank}. {SAME}"
        if set(other) != set(first):
            name = min(set(other) ^ set(first))
            there, missing = (rank, 0) if name in other else (0, rank)
            return f"{name} is there on rank {there} and not on rank {missing}. {SAME}"
        if seeds_there != common and not was_drawn:
            here, there = next(pair for pair in zip(common, seeds_there, strict=True) if pair[0] != pair[1])
            return (
                f"seed is {here} on rank 0 and {there} on rank {rank}. Give all ranks the same, or none: then all take the one "
                "that rank 0 draws."
            )
    return ""


def check_tensors(tensors: Mapping[MeshDim, Mapping[str, Tensor]]) -> None:
    """Compare tensors bit for bit: for each dimension of the mesh, those that have to be the same along it.

    Raises:
        StateError: on all ranks, naming the first that differs.
    """
    error = ""
    for dim, compared in tensors.items():
        theirs = everyone(dim, ({name: _checksum(tensor) for name, tensor in compared.items()}, error))
        told = [other[1] for other in theirs if other[1]]
        error = told[0] if told else _differs([other[0] for other in theirs])
    if error:
        raise StateError(error)


def _differs(checksums: Sequence[Mapping[str, int]]) -> str:
    """Which tensor differs, in words, or ""."""
    first, *others = checksums
    for rank, other in enumerate(others, 1):
        for name in first:
            if other.get(name) != first[name]:
                return (
                    f"{name} differs between rank 0 and rank {rank}, although the ranks are to hold the same. Load a checkpoint "
                    "on all of them; if it comes again, please report this."
                )
    return ""


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())

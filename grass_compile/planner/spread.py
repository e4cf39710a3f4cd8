"""The plan of one rank of several, by arithmetic upon the plan of one process (``docs/distributed.md`` says what is sent)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from ..errors import ConfigError

Sharding = Literal["ddp", "fsdp2", "hsdp", "tp"]

SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp2", "hsdp", "tp")

PREFETCHED = 2
"""Blocks whose weights FSDP2 holds whole at a time: the one that runs and the next."""

BUFFERS = "gathered weights and buckets"


@dataclasses.dataclass(frozen=True)
class World:
    """How training is spread.

    Attributes:
        sharding: ``ddp``, ``fsdp2``, ``hsdp`` (FSDP2 on a mesh of replicas and shards) or ``tp``.
        replicas: ranks that hold the same.
        shards: ranks that own a part each.
    """

    sharding: Sharding
    replicas: int
    shards: int

    @classmethod
    def parse(cls, world: int | str, sharding: str | None) -> World | None:
        """Read ``8``, or ``2x4`` (replicas times shards) for ``hsdp``.

        Returns:
            None for one process.

        Raises:
            ConfigError: it makes no sense.
        """
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", str(world))
        if found is None or 0 in (sizes := [int(size) for size in found.groups() if size is not None]):
            raise ConfigError(f"world={world!r} must be a number of ranks, or replicas x shards, as 2x4.")
        if sharding is None and sizes == [1]:
            return None
        if sharding not in SHARDINGS:
            raise ConfigError(f"sharding={sharding!r} must be one of {', '.join(SHARDINGS)}.")
        if (len(sizes) == 2) != (sharding == "hsdp"):
            raise ConfigError(
                f"sharding={sharding!r} with world={world!r}: hsdp takes replicas x shards, as 2x4, the others a number."
            )
        replicas, shards = sizes if len(sizes) == 2 else (sizes[0], 1) if sharding == "ddp" else (1, sizes[0])
        return cls(sharding, replicas, shards)


def of_rank(
    kinds: Mapping[str, int], inside: Mapping[str, int], outside: int, gradients: int, phase: str, world: World
) -> dict[str, int]:
    """Bytes by kind that one rank holds where one process holds ``kinds``.

    Args:
        kinds: by kind, of one process.
        inside: bytes of the weights of each block.
        outside: bytes of all other weights.
        gradients: bytes of all dense gradients.
        phase: ``forward``, ``backward`` or ``update``.
        world: how it is spread.

    Returns:
        The same kinds, and `BUFFERS`. Activations count as on one process, which under tensor parallelism is too much.
    """
    found = dict(kinds)
    found[BUFFERS] = 0
    if world.sharding == "ddp":
        found[BUFFERS] = gradients  # the reducer's buckets
    elif world.sharding == "tp":
        for kind in ("compact state", "compact gradients"):
            found[kind] = -(-kinds[kind] // world.shards)
        found["parameters"] = outside - (-sum(inside.values()) // world.shards)
    else:
        for kind in ("parameters", "compact state", "dense state", "compact gradients", "dense gradients"):
            found[kind] = -(-kinds[kind] // world.shards)
        if phase != "update":
            found[BUFFERS] = outside + PREFETCHED * max(inside.values(), default=0)
    return found


def sent(parameters: int, compact: int, dense: int, world: World) -> dict[str, int]:
    """Bytes that each rank sends to others in a regular step, by collective; of rings, as most libraries choose them.

    Args:
        parameters: bytes of all weights.
        compact: bytes of all compact gradients in the dtype in which they travel.
        dense: bytes of all dense gradients.
        world: how it is spread.
    """
    once = (world.shards - 1) / world.shards
    if world.sharding == "ddp":
        return {"all-reduce of gradients": int(2 * (world.replicas - 1) / world.replicas * (compact + dense))}
    if world.sharding == "tp":
        return {}  # but activations, as in any training
    found = {
        "all-gather of weights, twice": int(2 * once * parameters),
        "reduce-scatter of gradients": int(once * (compact + dense)),
    }
    if world.replicas > 1:
        part = (compact + dense) / world.shards
        found["all-reduce between replicas"] = int(2 * (world.replicas - 1) / world.replicas * part)
    return found

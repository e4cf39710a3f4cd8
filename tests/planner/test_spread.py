"""What a rank of several holds and sends."""

from __future__ import annotations

from typing import Any

import pytest

from grass_compile import ConfigError
from grass_compile.planner.ledger import KINDS
from grass_compile.planner.spread import BUFFERS, World, of_rank, sent

INSIDE, OUTSIDE = {"layers.0": 100, "layers.1": 120}, 580
KINDS_OF_ONE = dict(zip(KINDS, (800, 64, 1200, 32, 600, 50, 40), strict=True))
GRADIENTS = 600


def rank(world: str, sharding: str, phase: str = "backward") -> dict[str, int]:
    parsed = World.parse(world, sharding)
    assert parsed is not None
    return of_rank(KINDS_OF_ONE, INSIDE, OUTSIDE, GRADIENTS, phase, parsed)


def test_ddp_holds_everything_and_the_buckets_of_the_rest() -> None:
    assert rank("8", "ddp") == {**KINDS_OF_ONE, BUFFERS: 600}


def test_fsdp_holds_its_part_and_what_is_gathered() -> None:
    found = rank("4", "fsdp2")
    assert [found[kind] for kind in KINDS] == [200, 16, 300, 8, 150, 50, 40]
    assert found[BUFFERS] == 580 + 2 * 120
    assert rank("4", "fsdp2", "update")[BUFFERS] == 0
    assert rank("2x4", "hsdp") == found


def test_tensor_parallelism_divides_what_is_in_blocks() -> None:
    found = rank("4", "tp")
    assert found["parameters"] == 580 + 220 // 4
    assert (found["compact state"], found["dense state"]) == (16, 1200)


def test_what_is_sent() -> None:
    """As `benchmarks.communication` has it: an all-reduce is twice a reduce-scatter."""
    given: dict[str, Any] = {"parameters": 8000, "compact": 800, "dense": 1600}
    assert sent(**given, world=World("ddp", 4, 1)) == {"all-reduce of gradients": 3600}
    sharded = {"all-gather of weights, twice": 12000, "reduce-scatter of gradients": 1800}
    assert sent(**given, world=World("fsdp2", 1, 4)) == sharded
    assert sent(**given, world=World("hsdp", 2, 4)) == {**sharded, "all-reduce between replicas": 600}


@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        ("0", "ddp"),
        ("00", "fsdp2"),
        ("many", "ddp"),
        ("2x4", "fsdp2"),
        ("8", "hsdp"),
        ("8", None),
        ("8", "pipeline"),
        ("x4", "hsdp"),
    ],
)
def test_worlds_that_make_no_sense(world: str, sharding: str | None) -> None:
    with pytest.raises(ConfigError, match=r"world|sharding"):
        World.parse(world, sharding)


def test_one_process() -> None:
    assert World.parse(1, None) is None

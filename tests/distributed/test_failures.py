"""What goes wrong on one rank: other settings, an exception in the middle of a step, its end, a restart."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import grass_compile
from grass_compile import ConfigError
from grass_compile.runtime import ranks as runtime_ranks

from .breaking import AtCollective, kill_this_process, raise_on_purpose
from .compare import how
from .ranks import Ranks, result_of
from .restart_script import KINDS, undisturbed
from .training import RANK, Decoder, Training, batches, train

ROOT = Path(__file__).parent.parent.parent

# ------------------------------------------------------------------------------------------------- other settings


def said_by(train_here: Callable[[], Any]) -> tuple[str, float]:
    """What a training says that is refused, and after how many seconds."""
    begun = time.perf_counter()
    try:
        train_here()
        said = ""
    except ConfigError as error:
        said = str(error)
    return said, time.perf_counter() - begun


def train_differently(mesh: tuple[int, ...], **differs: Any) -> tuple[str, float]:
    """Train, each rank with a value of its own for some keywords."""
    mine = {name: values[dist.get_rank()] for name, values in differs.items()}
    torch_version = mine.pop("torch", torch.__version__)
    version = mine.pop("grass_compile", grass_compile.__version__)
    optimizer = mine.pop("optimizer", "AdamW")
    training = Training(how(**mine), optimizer=optimizer, mesh=mesh, place="blocks", steps=3)
    with (
        mock.patch.object(torch, "__version__", torch_version),
        mock.patch.object(runtime_ranks, "__version__", version),
    ):
        return said_by(lambda: train(training))


DIFFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"rank": (2, 3)}, "weight: rank is 2 on rank 0 and 3 on rank 1"),
    ({"rank": (2, None)}, "weight: rank is 2 on rank 0 and None on rank 1"),
    ({"rank": (None, 2)}, "weight: rank is None on rank 0 and 2 on rank 1"),
    ({"seed": (1, 2)}, "seed is 1 on rank 0 and 2 on rank 1"),
    ({"torch": ("2.13.0", "2.12.1")}, "torch version is 2.13.0 on rank 0 and 2.12.1 on rank 1"),
    ({"grass_compile": ("0.1.0", "0.2.0")}, "version of grass_compile is 0.1.0 on rank 0 and 0.2.0 on rank 1"),
    ({"optimizer": ("AdamW", "Lion")}, "the rule is AdamWRule.* on rank 0 and LionRule.* on rank 1"),
    ({"exclude": ((), ("*.query.*",))}, "weight: exclude is .* on rank 0"),
]


@pytest.mark.parametrize("mesh", [(), (2,)], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(("differs", "message"), DIFFERENCES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_ranks_that_differ_say_so_at_once(ranks: Ranks, mesh: tuple[int, ...], differs: dict[str, Any], message: str) -> None:
    """All of them, before anything is compiled."""
    for said, seconds in result_of(ranks(train_differently, mesh, **differs)):
        assert re.search(message, said), said
        assert seconds < 10


@pytest.mark.parametrize("mesh", [(), pytest.param((2,), marks=pytest.mark.exhaustive)], ids=["ddp", "fsdp"])
def test_unmodified_scripts_that_differ_say_so(ranks: Ranks, mesh: tuple[int, ...]) -> None:
    """In their second step: the first one is dense, and nothing is known of the optimizer before."""
    differs = {"optimizer": ("adopted", "adopted"), "rank": (2, 3)}
    for said, _ in result_of(ranks(train_differently, mesh, **differs)):
        assert "weight: rank is 2 on rank 0 and 3 on rank 1" in said


class Layer(nn.Module):
    """One layer, by some name."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(*shape, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


def train_another_model(wrapper: str) -> tuple[str, float]:
    """Models in which the wrapper finds no difference: under DDP, of the same shapes in the same order; under ``fully_shard``, of
    as many numbers, or of more, at which its first message would end the process."""
    other = dist.get_rank() == 1
    name = "second" if other and wrapper == "ddp" else "first"
    shape = {"fsdp": (24, 16), "larger": (16, 40)}.get(wrapper, (16, 24)) if other else (16, 24)
    model = Layer(name, *shape)
    if wrapper != "ddp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    make = functools.partial(grass_compile.AdamW, model.named_parameters(), rank=2, seed=1)
    if wrapper != "ddp":
        return said_by(make)
    optimizer = make()
    run: Any = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    run = DistributedDataParallel(run) if wrapper == "ddp" else run
    said = said_by(lambda: run(torch.ones(4, shape[0])).sum().backward())
    del optimizer
    return said


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("ddp", r"parameter 0 is first.weight \[24, 16\] .* on rank 0 and second.weight"),
        ("fsdp", r"parameter 0 is first.weight \[24, 16\] .* on rank 0 and first.weight \[16, 24\]"),
        ("larger", r"parameter 0 is first.weight \[24, 16\] .* on rank 0 and first.weight \[40, 16\]"),
    ],
)
def test_ranks_with_other_models_say_so_at_once(ranks: Ranks, wrapper: str, message: str) -> None:
    for said, seconds in result_of(ranks(train_another_model, wrapper)):
        assert re.search(message, said), said
        assert seconds < 10


# ------------------------------------------------------------------------------------- a rank that breaks off in a step

MINUTE = datetime.timedelta(minutes=1)
PATIENCE = 3
"""Seconds that a rank waits for the others in the step that breaks off."""


def train_until_one_breaks_off(kind: str, group: Any, act: Callable[[], Any]) -> tuple[str, float]:
    """Train on the ranks of a group, of which the last one does something in the middle of the third step's backward.

    Returns:
        What was raised in that step, and after how many seconds.
    """
    model = Decoder()
    for layer in model.layers:
        layer.compile(backend="grass", options={"compiler": "aot_eager"})
    run: Any = model
    if kind == "ddp":
        run = DistributedDataParallel(model, process_group=group)
    else:
        for module in (*model.layers, model):
            fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=RANK, seed=5, step_in_backward=True)
    for step, tokens in enumerate(batches(3)):
        if step == 2:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE), group)
        breaks_off = step == 2 and dist.get_rank(group) == 1
        begun = time.perf_counter()
        try:
            loss = cross_entropy(run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            with AtCollective(2, act) if breaks_off else contextlib.nullcontext():
                loss.backward()
            optimizer.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}", time.perf_counter() - begun
        optimizer.zero_grad()
    return "", 0.0


def one_breaks_off(kind: str, act: Callable[[], Any]) -> tuple[str, float]:
    return train_until_one_breaks_off(kind, dist.new_group([0, 1], timeout=MINUTE), act)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_others_do_not_wait_for_ever_for_a_rank_that_raised(kind: str, tmp_path: Path) -> None:
    """It lives on, and sends nothing more. (Their connection is closed for good, so these two are of no use to other tests.)"""
    two = Ranks(2, tmp_path)
    try:
        (waited, seconds), (raised, _) = result_of(two(one_breaks_off, kind, raise_on_purpose))
    finally:
        two.close()
    assert "OnPurpose" in raised
    assert "Timed out" in waited, waited
    assert seconds < PATIENCE + 5


def lose_two() -> list[tuple[str, float]]:
    """The first rank trains with another one that dies, and then with a third one that dies."""
    groups = {"ddp": dist.new_group([0, 1], timeout=MINUTE), "fsdp": dist.new_group([0, 2], timeout=MINUTE)}
    mine = {kind: group for kind, group in groups.items() if group is not dist.GroupMember.NON_GROUP_MEMBER}
    return [train_until_one_breaks_off(kind, group, kill_this_process) for kind, group in mine.items()]


def test_the_others_end_when_a_rank_dies(tmp_path: Path) -> None:
    three = Ranks(3, tmp_path)
    try:
        outcomes, *dead = three(lose_two)
    finally:
        three.close()
    assert [type(end) for end in dead] == 2 * [EOFError]
    for said, seconds in outcomes:
        assert re.search(r"RuntimeError: .*(closed|reset) by peer", said), said
        assert seconds < 5


# --------------------------------------------------------------------------------------------------------- a restart


@pytest.mark.parametrize(
    ("moments", "begins"),
    [
        (("ddp:5",), [(0, 0), (4, 4)]),
        pytest.param(("save:5", "fsdp:8"), [(0, 0), (6, 4), (8, 8)], marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_of_which_ranks_were_killed_ends_as_one_that_was_left_alone(
    ranks: Ranks, moments: tuple[str, ...], begins: list[tuple[int, int]], tmp_path: Path
) -> None:
    """``torchrun`` starts all ranks again; they go on from the last checkpoint, and end with the same weights bit for bit."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(len(moments))]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [*launch, "-m", "tests.distributed.restart_script", str(tmp_path), *moments]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # with torch 2.13, Gloo finds addresses of the last attempt in it
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    expected = result_of(ranks(undisturbed))[0]
    found = torch.load(tmp_path / "end", weights_only=True)
    assert found.keys() == expected.keys() and {name.split()[0] for name in found} == set(KINDS)
    for rank in range(2):
        begun = [json.loads(line) for line in (tmp_path / f"begun {rank}").read_text().splitlines()]
        assert begun == [dict(zip(KINDS, steps, strict=True)) for steps in begins]
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []

"""Several ranks against one process on the joined batch: a model of Hugging Face, clipping, lengths that do not divide."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import grass_compile
from grass_compile.runtime.gradient import CompactGrad
from grass_compile.runtime.moved import MovedGrad

from .llama import PROJECTED, VOCABULARY, llama
from .ranks import Ranks, result_of
from .training import whole

WORLD = 2
AOT = {"compiler": "aot_eager"}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and values within rounding."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


def mine(batch: Tensor, distributed: bool) -> Tensor:
    """This rank's part of a joined batch, or all of it."""
    return batch.chunk(WORLD)[dist.get_rank()] if distributed else batch


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter, as one tensor."""
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


# --------------------------------------------------------------------------------------- a model of Hugging Face


def train_llama(kind: str, distributed: bool = True) -> dict[str, Tensor]:
    """Five steps, of which the first and the fourth refresh; weights, and the rows of those that are projected.

    Args:
        kind: ``ddp`` and ``fsdp`` compile block by block; ``whole`` is sharded and compiled as one.
        distributed: whether on all ranks.
    """
    model = llama()
    run: Any = model
    if kind != "whole":
        for layer in model.model.layers:
            layer.compile(backend="grass", options=AOT)
    if distributed and kind == "ddp":
        run = DistributedDataParallel(model)
    elif distributed:
        mesh = init_device_mesh("cpu", (WORLD,))
        for module in (*(model.model.layers if kind != "whole" else ()), model):
            fully_shard(module, mesh=mesh)
    if kind == "whole":
        run = torch.compile(model, backend="grass", options=AOT)
    optimizer = grass_compile.AdamW(
        model.named_parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6, rank=8, selection="top", update_proj_gap=3, stagger=False
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        tokens = mine(torch.randint(VOCABULARY, (4, 13), generator=generator), distributed)
        logits = run(input_ids=tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.fused
    rows = {f"{name}: rows": optimizer.state[p]["index"] for name, p in model.named_parameters() if "index" in optimizer.state[p]}
    if distributed:
        optimizer.check_agreement()
    return wholes(model) | rows


@functools.cache
def llama_alone() -> dict[str, Tensor]:
    return train_llama("ddp", distributed=False)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", pytest.param("whole", marks=pytest.mark.exhaustive)])
def test_a_model_of_hugging_face(ranks: Ranks, kind: str) -> None:
    pytest.importorskip("transformers")
    expected = llama_alone()
    assert sum(name.endswith("rows") for name in expected) == PROJECTED
    for found in result_of(ranks(train_llama, kind)):
        assert_near(found, expected)


# ------------------------------------------------------------------------------------------------- clipping


class Small(nn.Module):
    """Two projected weights, and biases and a norm that stay dense."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.norm = nn.LayerNorm(widths[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def clip(distributed: bool) -> tuple[list[float], list[str], dict[str, Tensor]]:
    """Four clipped steps; the norms before, the kinds of the first weight's gradients after the backwards, and the weights."""
    torch.manual_seed(0)
    model = Small(12, 10, 8)
    optimizer = grass_compile.AdamW(
        model.named_parameters(), rank=4, seed=1, lr=1e-2, eps=1e-6, max_grad_norm=CLIPPED, step_in_backward=True
    )
    run = torch.compile(DistributedDataParallel(model) if distributed else model, backend="grass", options=AOT)
    norms, kinds = [], []
    for step in range(4):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        run(mine(x, distributed)).square().mean().backward()
        kinds.append(type(model.layers[0].weight.grad).__name__)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
        optimizer.zero_grad()
    return norms, kinds, wholes(model)


CLIPPED = 0.02


def test_one_norm_clips_the_mean_gradients(ranks: Ranks) -> None:
    """One process clips inside the graph. Ranks do it in ``opt.step()``, once the dense gradients are averaged too, by the norm
    of the mean."""
    norms, kinds, weights = clip(distributed=False)
    assert kinds == 4 * [MovedGrad.__name__] and min(norms) > 2 * CLIPPED
    for found_norms, found_kinds, found in result_of(ranks(clip, True)):
        assert found_kinds == 4 * [CompactGrad.__name__]
        assert found_norms == pytest.approx(norms, rel=1e-5)
        assert_near(found, weights)


# --------------------------------------------------------------------------------------- lengths that do not divide


@dataclasses.dataclass(frozen=True)
class Case:
    """Layers and settings, drawn at random."""

    widths: tuple[int, ...]
    rank: int
    axis: str
    selection: str
    mode: Any
    on_refresh: str

    @staticmethod
    def drawn(seed: int) -> Case:
        chance = random.Random(seed)
        return Case(
            widths=tuple(chance.randint(2, 19) for _ in range(4)),
            rank=chance.randint(1, 9),
            axis=chance.choice(["rows", "columns"]),
            selection=chance.choice(["uniform", "top", "norm"]),
            mode=chance.choice([True, False, "auto"]),
            on_refresh=chance.choice(["carry", "reset", "keep"]),
        )


def train_case(kind: str, case: Case, distributed: bool, exclude: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Five steps; the weights, and the rows of those that are projected."""
    torch.manual_seed(0)
    model = Small(*case.widths)
    run: Any = torch.compile(model, backend="grass", options=AOT)
    if distributed and kind == "ddp":
        run = DistributedDataParallel(run)
    elif distributed:
        rows = case.axis == "rows"
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if rows and p.dim() == 2 else 0))
    how = {field: getattr(case, field) for field in ("rank", "axis", "selection", "on_refresh")}
    optimizer = grass_compile.AdamW(
        model.named_parameters(), lr=1e-2, eps=1e-4, seed=3, update_proj_gap=3, exclude=exclude, step_in_backward=case.mode, **how
    )
    for step in range(5):
        x = torch.randn(8, 3, case.widths[0], generator=torch.Generator().manual_seed(step))
        part = x.chunk(dist.get_world_size())[dist.get_rank()] if distributed else x
        run(part).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state
    return wholes(model) | {f"{name}: rows": state[p]["index"] for name, p in model.named_parameters() if "index" in state[p]}


def left_out(case: Case, world: int) -> set[str]:
    """The weights of which some rank would own nothing."""
    lengths = case.widths[:-1] if case.axis == "rows" else case.widths[1:]
    return {f"layers.{at}.weight" for at, length in enumerate(lengths) if (world - 1) * -(-length // world) >= length}


def check_case(group: Ranks, kind: str, case: Case) -> None:
    if kind == "fsdp" and case.axis == "rows":  # FSDP2 itself divides columns evenly or not at all
        even = [group.size * -(-width // group.size) for width in case.widths[:-1]]
        case = dataclasses.replace(case, widths=(*even, case.widths[-1]))
    dense = left_out(case, group.size) if kind == "fsdp" else set()
    expected = train_case(kind, case, False, tuple(dense))
    for found in result_of(group(train_case, kind, case, True)):
        assert_near(found, expected)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [pytest.param(kind, seed, marks=() if (kind, seed) in (("ddp", 0), ("fsdp", 3)) else pytest.mark.exhaustive)
     for kind in ("ddp", "fsdp") for seed in range(12)],
)  # fmt: skip
def test_lengths_that_do_not_divide(ranks: Ranks, kind: str, seed: int) -> None:
    check_case(ranks, kind, Case.drawn(seed))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 106))
def test_lengths_that_do_not_divide_on_four_ranks(four: Ranks, seed: int) -> None:
    check_case(four, "fsdp", Case.drawn(seed))

"""``DistributedDataParallel``: two ranks train as one process does on the joined batch, and send compact gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import unittest.mock
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import grass_compile
from grass_compile import ConfigError, GrassWarning, StateError
from grass_compile.runtime import ranks as runtime_ranks

from ..pairs import every_value
from .compare import COMPACT, SCORES, SHAPES, compare, how
from .ranks import Ranks, result_of
from .training import PROJECTED, RANK, Decoder, Outcome, Training, batches, micro_batches, train

DENSE = sum(p.numel() for name, p in Decoder().named_parameters() if name.removesuffix(".weight") not in PROJECTED)


@every_value(axis=["columns", "rows"], selection=["uniform", "top", "norm"], mode=[True, "auto", False])
def test_two_ranks_are_one_process(ranks: Ranks, axis: str, selection: str, mode: Any) -> None:
    """And a regular step sends exactly the compact gradients, and the dense rest."""
    found = compare(ranks, Training(how(axis=axis, selection=selection, step_in_backward=mode)))
    assert found.fused == (mode is not False)
    assert found.regular == {"_c10d_functional": COMPACT[axis], "c10d": DENSE}
    parts = sum(m * n for m, n in SHAPES) + SCORES[axis] + COMPACT[axis] // 2
    assert found.refresh["_c10d_functional"] == (COMPACT[axis] if selection == "uniform" else parts)


@pytest.mark.parametrize("place", ["model", "blocks"])
def test_what_is_compiled_does_not_matter(ranks: Ranks, place: str) -> None:
    compare(ranks, Training(how(step_in_backward=True), place=place))


@every_value(selection=["uniform", "top"], no_sync=[False, True])
def test_accumulation(ranks: Ranks, selection: str, no_sync: bool) -> None:
    """Under ``no_sync()``, compact gradients are sent once a step."""
    found = compare(ranks, Training(how(selection=selection), micro=2, no_sync=no_sync))
    assert found.regular["_c10d_functional"] == COMPACT["columns"] * (1 if no_sync else 2)


FEATURES = [
    Training(clip=0.05),
    pytest.param(Training(how(max_grad_norm=0.05)), marks=pytest.mark.exhaustive),
    Training(how(max_grad_norm=0.05), micro=2, no_sync=True),
    pytest.param(Training(how(projection="gaussian")), marks=pytest.mark.exhaustive),
    pytest.param(Training(how(projection="galore")), marks=pytest.mark.exhaustive),
    pytest.param(Training(how(stagger=True)), marks=pytest.mark.exhaustive),
    pytest.param(Training(how(share_index=True)), marks=pytest.mark.exhaustive),
    pytest.param(Training(how(on_refresh="reset", selection="top")), marks=pytest.mark.exhaustive),
    pytest.param(Training(how(step_in_backward=True), micro=2, no_sync=True, accumulate=False), marks=pytest.mark.exhaustive),
    pytest.param(Training(ddp=how(find_unused_parameters=True)), marks=pytest.mark.exhaustive),
    pytest.param(Training(ddp=how(gradient_as_bucket_view=True)), marks=pytest.mark.exhaustive),
    pytest.param(Training(ddp=how(hook=True)), marks=pytest.mark.exhaustive),
    pytest.param(Training(ddp=how(bucket_cap_mb=0.001)), marks=pytest.mark.exhaustive),
    pytest.param(Training(how(selection="norm", block=4)), marks=pytest.mark.exhaustive),
    Training(optimizer="Muon"),
    pytest.param(Training(optimizer="AdamW8bit"), marks=pytest.mark.exhaustive),
    pytest.param(Training(optimizer="adopted"), marks=pytest.mark.exhaustive),
    Training(optimizer="adopted", micro=2, no_sync=True),
]


@pytest.mark.parametrize("training", FEATURES, ids=lambda t: f"{t.optimizer}-{dict(t.how)}-{t.micro}-{t.clip}-{dict(t.ddp)}")
def test_features(ranks: Ranks, training: Training) -> None:
    compare(ranks, training)


@pytest.mark.parametrize(
    ("selection", "compiler"),
    [
        pytest.param("uniform", "aot_eager", marks=pytest.mark.exhaustive),
        ("top", "aot_eager"),
        pytest.param("top", "inductor", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
        pytest.param("uniform", "inductor", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
    ],
)
def test_a_rank_that_logs(ranks: Ranks, selection: str, compiler: str) -> None:
    """Its steps wait for ``opt.step()`` while the others are fused; all of them send in the same order. (Many weights are
    of one shape, so that in another order nothing would fail.)"""
    training = Training(how(selection=selection), alone=0, compiler=compiler)
    outcomes: list[Outcome] = result_of(ranks(train, training))
    assert [outcome.fused for outcome in outcomes] == [False, True]
    alone = train(training, distributed=False)
    for name, weight in alone.weights.items():
        assert torch.equal(outcomes[0].weights[name], outcomes[1].weights[name])
        torch.testing.assert_close(outcomes[0].weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selection", [pytest.param("uniform", marks=pytest.mark.exhaustive), "top"])
def test_resuming_on_another_number_of_ranks(ranks: Ranks, selection: str) -> None:
    training = Training(how(selection=selection))
    half = dataclasses.replace(training, steps=4)
    expected = train(training, distributed=False)
    on_two = result_of(ranks(train, half))[0]
    on_one = train(half, distributed=False)
    for found in (train(training, False, 4, on_two.saved), result_of(ranks(train, training, True, 4, on_one.saved))[0]):
        for name, weight in expected.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.inductor
@pytest.mark.exhaustive
def test_under_inductor(ranks: Ranks) -> None:
    compare(ranks, Training(how(step_in_backward=True), compiler="inductor", steps=4))


class Wide(nn.Module):
    """Blocks of more than half a MiB, of which DDP's first bucket takes one or two."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 384), nn.LayerNorm(384)
        self.layers = nn.ModuleList([nn.Linear(384, 384) for _ in range(4)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x)).relu()
        return x


def split_by_default(optimize_ddp: bool) -> list[torch.Tensor]:
    """Some steps of a model that torch compiles in several graphs, one for each of DDP's buckets of their default sizes."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2**20
    torch.manual_seed(0)
    model = Wide()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=8, seed=0, eps=1e-6)
    run = torch.compile(DistributedDataParallel(model), backend="grass", options={"compiler": "aot_eager"})
    with torch._dynamo.config.patch(optimize_ddp=optimize_ddp), warnings.catch_warnings():
        warnings.simplefilter("error", GrassWarning)
        for step in range(4):
            tokens = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(step + 10 * dist.get_rank()))
            run(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [name for name, p in model.named_parameters() if "index" in optimizer.state[p]] == [
        f"layers.{number}.weight" for number in range(4)
    ]
    return [p.detach() for p in model.parameters()]


def test_buckets_of_the_default_size(ranks: Ranks) -> None:
    """Without a warning that nobody holds the parameters, and as if torch had compiled all of it in one graph."""
    split, whole = result_of(ranks(split_by_default, True)), result_of(ranks(split_by_default, False))
    for found, same, expected in zip(*split, whole[0], strict=True):
        assert torch.equal(found, same)
        torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------------------ agreement


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


def train_differently(**differs: Any) -> None:
    """One rank with another keyword, or model."""
    mine = {name: values[dist.get_rank()] for name, values in differs.items()}
    torch.manual_seed(mine.pop("manual_seed", 0))
    model = Small()
    if mine.pop("hook", False):
        model.first.weight.register_hook(lambda gradient: gradient)
    optimizer = grass_compile.AdamW(model.named_parameters(), **{"rank": 2, **mine})
    run = torch.compile(DistributedDataParallel(model), backend="grass", options={"compiler": "aot_eager"})
    for _ in range(4):
        run(torch.randn(3, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.check_agreement()


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"hook": (True, False)}, "why first.weight stays dense is it has a hook.*on rank 0 and None on rank 1"),
        ({"rank": (2, 3)}, "first.weight: rank is 2 on rank 0 and 3 on rank 1"),
        ({"seed": (1, 2)}, "seed is 1 on rank 0 and 2 on rank 1"),
        ({"selection": ("top", "uniform")}, "first.weight: selection is 'top' on rank 0 and 'uniform' on rank 1"),
        ({"betas": ((0.9, 0.99), (0.9, 0.999))}, "first.weight: betas is .* on rank 0"),
    ],
)
def test_ranks_that_differ_are_refused_on_all(ranks: Ranks, differs: dict[str, Any], message: str) -> None:
    for result in ranks(train_differently, **differs):
        assert isinstance(result, ConfigError) and re.search(message, str(result)), result


def test_a_seed_that_is_drawn_is_that_of_the_first_rank(ranks: Ranks) -> None:
    result_of(ranks(train_differently, manual_seed=(1, 2)))


def drift() -> None:
    model = Small()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=2)
    run = torch.compile(DistributedDataParallel(model), backend="grass", options={"compiler": "aot_eager"})
    run(torch.randn(3, 8)).square().mean().backward()
    optimizer.step()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.first.weight[3, 4] += 1e-7
    optimizer.check_agreement()


def test_weights_that_drifted_apart_are_found(ranks: Ranks) -> None:
    for result in ranks(drift):
        assert isinstance(result, StateError) and "first.weight differs between rank 0 and rank 1" in str(result)


def train_other_rows() -> tuple[int, str]:
    """The updates until a rank that trains other rows than the others is found, and what is said."""
    model = Small()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=2, update_proj_gap=100)
    run = torch.compile(DistributedDataParallel(model), backend="grass", options={"compiler": "aot_eager"})
    with unittest.mock.patch.object(runtime_ranks, "COMPARED_EVERY", 3):
        for updates in range(1, 9):
            run(torch.randn(3, 8)).square().mean().backward()
            try:
                optimizer.step()
            except StateError as error:
                return updates, str(error)
            optimizer.zero_grad()
            if dist.get_rank() == 1 and updates == 4:
                index = optimizer.state[model.first.weight]["index"].data
                index.copy_((index + 1) % 8)
    return 0, ""


def test_rows_that_drifted_apart_are_found_without_asking(ranks: Ranks) -> None:
    for updates, said in result_of(ranks(train_other_rows)):
        assert updates == 6 and "first.weight: index differs between rank 0 and rank 1" in said


# ------------------------------------------------------------------------------------------------------------ refusals


def refuse(kind: str) -> None:
    model = Small()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=2)
    wrapped = DistributedDataParallel(model, static_graph=kind == "static_graph")
    run = torch.compile(wrapped, backend="grass", options={"compiler": "aot_eager"})
    before = [p.detach().clone() for p in model.parameters()]
    try:
        with wrapped.join() if kind == "join" else torch.enable_grad():
            loss = run(torch.randn(3, 8)).square().mean()
            if kind == "later penalty":
                loss.backward()
                loss = model.first.weight.square().sum()
            loss = loss + (model.first.weight.square().sum() if kind == "penalty" else 0)
            loss.backward()
    finally:
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        del optimizer


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("static_graph", ConfigError, "DistributedDataParallel with static_graph=True is not supported"),
        ("join", ConfigError, r"join\(\) for uneven inputs is not supported"),
        ("later penalty", StateError, "first.weight: it gets a gradient from outside of its compiled region"),
        ("penalty", StateError, "first.weight: it gets a gradient from outside of its compiled region.*average over the ranks"),
    ],
)
def test_what_is_not_supported_is_refused_on_all(ranks: Ranks, kind: str, error: type[Exception], message: str) -> None:
    for result in ranks(refuse, kind):
        assert isinstance(result, error) and re.search(message, str(result)), result


# ------------------------------------------------------------------------------------------- several forwards, falling out


def two_forwards(distributed: bool, selection: str, apart: int) -> dict[str, torch.Tensor]:
    """One backward for two forwards, one of them under ``no_sync()``: what both leave is averaged."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=RANK, eps=1e-6, lr=1e-2, seed=3, selection=selection)
    wrapped: Any = DistributedDataParallel(model) if distributed else model
    run = torch.compile(wrapped, backend="grass", options={"compiler": "aot_eager"})
    for tokens in batches(4):
        loss: Any = 0
        for number, part in enumerate(micro_batches(tokens, 2, distributed)):
            with wrapped.no_sync() if distributed and number == apart else contextlib.nullcontext():
                loss = loss + nn.functional.cross_entropy(run(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.removesuffix(".weight") in PROJECTED}


@every_value(selection=["uniform", "top"], apart=[0, 1])
def test_two_forwards_of_which_one_averages(ranks: Ranks, selection: str, apart: int) -> None:
    one, other = result_of(ranks(two_forwards, True, selection, apart))
    alone = two_forwards(False, selection, apart)
    for name, weight in alone.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, at=name: f"{at}: {text}")


def fall_out(distributed: bool) -> dict[str, torch.Tensor]:
    """A step in the middle runs uncompiled: the whole gradient of each weight is averaged."""
    torch.manual_seed(0)
    model = Decoder()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=RANK, eps=1e-6, lr=1e-2, seed=3, step_in_backward=False)
    run: Any = DistributedDataParallel(model) if distributed else model
    compiled = torch.compile(run, backend="grass", options={"compiler": "aot_eager"})
    for step, tokens in enumerate(batches(5)):
        if distributed:
            tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()]
        forward = run if step == 3 else compiled
        logits = forward(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_call_that_falls_out_of_the_compiled_region(ranks: Ranks) -> None:
    first, second = result_of(ranks(fall_out, True))
    alone = fall_out(False)
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-5)

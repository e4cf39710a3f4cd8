"""Stochastic rounding to bf16: unbiased, reproducible, the same from every compiler, and small updates are not lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass_compile import ops
from grass_compile.math.noise import rounding_noise
from grass_compile.math.rounding import round_stochastically
from grass_compile.runtime.schedule import seed_of

from .. import forms, paper

MOST = 2**16 - 1


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return rounding_noise(shape, torch.tensor(float(seed)))


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers next to fp32 values, toward zero and away from it."""
    bits = value.view(torch.int32) & -65536
    return bits.view(torch.float32).bfloat16(), (bits + 65536).view(torch.float32).bfloat16()


def values(count: int = 4096) -> Tensor:
    """fp32 numbers of all magnitudes and both signs, subnormal ones too."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    found = bits.view(torch.float32)
    return found[found.isfinite() & (found.abs() < 3e38)]


# --------------------------------------------------------------------------------------------------------- the rounding


def test_rounds_to_one_of_the_two_neighbours() -> None:
    value = values()
    below, above = neighbours(value)
    up = 0
    for seed in range(16):
        rounded = round_stochastically(value, noise(tuple(value.shape), seed))
        assert rounded.dtype is torch.bfloat16
        assert ((rounded == below) | (rounded == above)).all()
        up += int((rounded == above).sum())
    assert 0.45 < up / (16 * len(value)) < 0.55


def test_extreme_noise_rounds_down_and_up() -> None:
    value = values()
    below, above = neighbours(value)
    exact = value == below.float()
    least, most = (torch.full(value.shape, bits, dtype=torch.int32) for bits in (0, MOST))
    assert torch.equal(round_stochastically(value, least), below)
    assert torch.equal(round_stochastically(value, most), torch.where(exact, below, above))


def test_bf16_numbers_stay_as_they_are() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    for bits in (0, 1, 2**15, MOST):
        rounded = round_stochastically(every.float(), torch.full(every.shape, bits, dtype=torch.int32))
        assert torch.equal(rounded.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("bits", [0, 1, 2**15, MOST])
def test_infinities_and_nan_stay(bits: int) -> None:
    strange = torch.tensor([float("inf"), float("-inf"), float("nan")])
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert payload.isnan().all()
    value = torch.cat([strange, payload])
    rounded = round_stochastically(value, torch.full(value.shape, bits, dtype=torch.int32))
    assert rounded[:2].tolist() == [float("inf"), float("-inf")] and rounded[2:].isnan().all()


def test_largest_finite_number_stays_finite() -> None:
    largest = torch.tensor([torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min])
    rounded = round_stochastically(largest, torch.full((2,), MOST, dtype=torch.int32))
    assert torch.equal(rounded.float(), largest)


def test_update_of_rows_rounds_once() -> None:
    """Of the sum in fp32, not of the update."""
    torch.manual_seed(0)
    weight, index = torch.randn(6, 8).bfloat16(), torch.tensor([1, 4])
    for dim, update in ((0, torch.randn(2, 8) * 1e-3), (1, torch.randn(6, 2) * 1e-3)):
        bits = noise(tuple(update.shape), 3)
        exact = weight.index_select(dim, index).float() + update
        expected = weight.index_copy(dim, index, round_stochastically(exact, bits))
        assert torch.equal(ops.row_update(weight, dim, index, update, bits), expected)
        written = weight.clone()
        ops.row_update_(written, dim, index, update, bits)
        assert torch.equal(written, expected)


# ------------------------------------------------------------------------------------------------------------ the noise


def test_noise_is_uniform_and_unbiased_over_seeds() -> None:
    """At every position, over the seeds of successive steps: the mean is the number itself, within 4 standard errors."""
    count, shape = 4096, (12, 12)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    below, above = (tensor.double() for tensor in neighbours(value))
    total, bits = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for step in range(count):
        drawn = noise(shape, seed_of(5, step))
        assert drawn.dtype is torch.int32
        bits += drawn
        total += round_stochastically(value, drawn).double()
    up = (value.double() - below) / (above - below)
    error = (above - below).abs() * (up * (1 - up) / count).sqrt()
    score = (total / count - value.double()) / error
    assert float(score.abs().max()) < 4
    assert abs(float(score.mean())) < 4 / score.numel() ** 0.5
    assert float(score.square().mean()) == pytest.approx(1, abs=4 * (2 / score.numel()) ** 0.5)
    assert float((bits / count - MOST / 2).abs().max()) < 4 * 2**16 / (12 * count) ** 0.5


def test_noise_is_uniform_over_positions() -> None:
    """Also along one row and one column, and in every bit."""
    for shape in ((1, 2**16), (2**16, 1), (256, 256)):
        for seed in (0, 1, seed_of(0, 0), seed_of(123, 456)):
            drawn = noise(shape, seed).flatten()
            assert int(drawn.min()) >= 0 and int(drawn.max()) <= MOST
            assert abs(float(drawn.double().mean()) - MOST / 2) < 4 * 2**16 / 12**0.5 / 2**8
            for bit in range(16):
                assert abs(float((drawn >> bit & 1).double().mean()) - 0.5) < 4 * 0.5 / 2**8
            counts = torch.bincount(drawn >> 8, minlength=256).double()
            assert float(((counts - 256) ** 2 / 256).sum()) < 255 + 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (1, 1)])
def test_noise_of_neighbours_is_uncorrelated(lag: tuple[int, int]) -> None:
    drawn = noise((256, 256), seed_of(0, 7)).double()
    centred = (drawn - MOST / 2) / (2**16 / 12**0.5)
    product = centred * centred.roll(lag, (0, 1))
    assert abs(float(product.mean())) < 4 / 256


def test_noise_of_successive_steps_is_uncorrelated() -> None:
    """That of weight decay (the next whole number) too."""
    for seed, other in [(seed_of(0, step), seed_of(0, step + 1)) for step in (0, 1, 126, 127, 128)] + [(5, 6), (6, 5)]:
        first, second = ((noise((256, 256), s).double() - MOST / 2) / (2**16 / 12**0.5) for s in (seed, other))
        assert abs(float((first * second).mean())) < 4 / 256


def test_noise_is_a_function_of_seed_and_position() -> None:
    first = noise((4, 6), 11)
    assert torch.equal(noise((4, 6), 11), first)
    assert not torch.equal(noise((4, 6), 12), first)
    assert torch.equal(noise((2, 6), 11), first[:2])


def test_seeds_of_steps_fit_fp32_and_differ() -> None:
    for seed in (0, 1, 2**31 - 1):
        seeds = [seed_of(seed, step) for step in range(20000)]
        assert len(set(seeds)) == len(seeds)
        assert all(float(torch.tensor(float(s + 1))) == s + 1 and s >= 0 for s in (min(seeds), max(seeds)))
    assert seed_of(1, 0) != seed_of(0, 0)


@pytest.mark.inductor
def test_inductor_rounds_bit_for_bit_as_eager() -> None:
    def step(weight: Tensor, index: Tensor, update: Tensor, seed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        bits = rounding_noise(update.shape, seed)
        ops.row_update_(weight, dim, index, update, bits)
        return bits, round_stochastically(update, bits)

    compiled = torch.compile(step, fullgraph=True)
    index = torch.tensor([0, 3, 4, 9])
    for dim in (0, 1):
        torch.manual_seed(dim)
        weight = torch.randn(16, 24).bfloat16()
        weight[3, 5] = float("inf")
        weight[4, 3] = float("nan")
        update = torch.randn((4, 24) if dim == 0 else (16, 4)) * 1e-2
        update[0, 2] = float("-inf")
        for seed in (0, 1, 2**23 - 1, seed_of(3, 77)):
            own, expected = weight.clone(), weight.clone()
            found = compiled(own, index, update, torch.tensor(float(seed)), dim)
            eager = step(expected, index, update, torch.tensor(float(seed)), dim)
            assert torch.equal(found[0], eager[0])
            assert torch.equal(found[1].view(torch.int16), eager[1].view(torch.int16))
            assert torch.equal(own.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.inductor
@pytest.mark.parametrize("axis", [pytest.param("rows", marks=pytest.mark.exhaustive), "columns"])
def test_inductor_steps_bit_for_bit_as_eager(axis: str) -> None:
    """Plain SGD by whole numbers, whose arithmetic is exact: what is left is the rounding."""
    weights = {}
    for compiler in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Linear(24, 16, bias=False).bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-13)
        options = {
            **paper.OPTIONS,
            "compiler": compiler,
            "rank": 4,
            "axis": axis,
            "update_proj_gap": 3,
            "stochastic_rounding": True,
            "seed": 5,
        }
        compiled = torch.compile(model, backend="grass", options=options)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            x, direction = (torch.randint(-4, 5, (3, size), generator=generator).bfloat16() for size in (24, 16))
            (compiled(x) * direction).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert "index" in optimizer.state[model.weight]
        weights[compiler] = model.weight.detach().clone()
    assert torch.equal(weights["aot_eager"], weights["inductor"])


# -------------------------------------------------------------------------------------------------------- in training


def trained(steps: int, *, model: nn.Module | None = None, gradient: float | None = None, **keywords: Any) -> tuple[Any, Any]:
    """A layer of ones in bf16 (or a model), trained by a constant gradient (or the usual loss); the model and its optimizer."""
    torch._dynamo.reset()
    if model is None:
        torch.manual_seed(0)
        model = forms.Linear().bfloat16()
        if gradient is not None:
            nn.init.ones_(model.w)
    keywords = {"rank": 8, "axis": "rows", "lr": 1e-3, "stochastic_rounding": True, **keywords}
    optimizer = paper.AdamW(model.named_parameters(), **keywords)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    constant = torch.ones(1, forms.N, dtype=next(model.parameters()).dtype)
    for step in range(steps):
        if gradient is None:
            loss = forms.loss_of(compiled(forms.batch(constant.dtype, step)))
        else:
            loss = compiled(constant).sum() * gradient
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


STEPS, LR = 1000, 1e-4


@pytest.mark.parametrize("stochastic", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_small_updates(stochastic: bool) -> None:
    """A thousand steps of 1e-4 from 1, where bf16 numbers are 4e-3 apart: lost to the nearest number, or 0.1 in the mean.

    Likewise the second moment, to which each step adds at most 0.1 %.
    """
    keywords: dict[str, Any] = dict(update_proj_gap=10**6, state_dtype=torch.bfloat16, stochastic_rounding=stochastic)
    model, optimizer = trained(STEPS, gradient=1.0, lr=LR, betas=(0.0, 0.999), eps=1e-12, **keywords)
    state = optimizer.state[model.w]
    assert state["exp_avg_sq"].dtype is torch.bfloat16 and state["updates"] == STEPS
    rows = model.w.detach().double()[state["index"]]
    others = torch.ones(forms.M, dtype=torch.bool).index_fill_(0, state["index"], False)
    assert (model.w[others] == 1).all()
    second = state["exp_avg_sq"].double()
    if not stochastic:
        assert (rows == 1).all() and float(second.max()) < 0.4
        return
    assert float(second.mean()) == pytest.approx(1 - 0.999**STEPS, abs=4 * float(second.std()) / second.numel() ** 0.5)
    assert 0 < float(second.std()) < 0.1
    # Each step moves a weight by one unit (2**-8 below 1) with probability LR / 2**-8.
    deviation = (STEPS * LR * 2**-8) ** 0.5
    assert float(rows.std()) == pytest.approx(deviation, rel=0.3)
    assert float(rows.mean()) == pytest.approx(1 - STEPS * LR, abs=4 * deviation / rows.numel() ** 0.5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_weight_decay(stochastic: bool) -> None:
    """It touches every row, the unselected ones by less than half a unit."""
    model, optimizer = trained(
        200, gradient=1.0, lr=1e-3, weight_decay=0.5, update_proj_gap=10**6, stochastic_rounding=stochastic
    )
    others = torch.ones(forms.M, dtype=torch.bool).index_fill_(0, optimizer.state[model.w]["index"], False)
    rest = model.w.detach().double()[others]
    if not stochastic:
        assert (rest == 1).all()
        return
    expected = (1 - 5e-4) ** 200
    assert float(rest.mean()) == pytest.approx(expected, abs=4 * float(rest.std()) / rest.numel() ** 0.5)
    assert 0 < float(rest.std()) < 0.05


def test_same_seed_same_bits() -> None:
    keywords: dict[str, Any] = dict(update_proj_gap=3, weight_decay=0.1, state_dtype=torch.bfloat16, lr=1e-2)
    (first, one), (second, two), (other, _) = (trained(7, seed=seed, **keywords) for seed in (3, 3, 4))
    assert torch.equal(first.w, second.w) and not torch.equal(first.w, other.w)
    for name, value in one.state[first.w].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, two.state[second.w][name]), name


def test_seed_is_drawn_from_torch_and_kept_in_the_groups() -> None:
    layer = nn.Linear(4, 4)

    def seed(start: int, **keywords: Any) -> tuple[int, bool]:
        """The seed, and whether making the optimizer drew a random number."""
        torch.manual_seed(start)
        before = torch.get_rng_state()
        optimizer = paper.AdamW(layer.named_parameters(), **keywords)
        return optimizer.state_dict()["param_groups"][0]["seed"], not torch.equal(torch.get_rng_state(), before)

    assert seed(0, stochastic_rounding=True) == seed(0, stochastic_rounding=True) != seed(1, stochastic_rounding=True)
    assert seed(0, stochastic_rounding=True)[1]
    assert seed(0, stochastic_rounding=True, seed=7) == (7, False)
    assert not seed(0)[1]


def test_resumed_run_goes_on_with_the_saved_seed() -> None:
    keywords: dict[str, Any] = dict(rank=8, axis="rows", lr=1e-2, stochastic_rounding=True, update_proj_gap=3)
    options = {"compiler": "aot_eager"}

    def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        compiled = torch.compile(model, backend="grass", options=options)
        for step in range(first, last):
            forms.loss_of(compiled(forms.batch(torch.bfloat16, step))).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = forms.Linear().bfloat16()
    optimizer = paper.AdamW(model.named_parameters(), seed=1, **keywords)
    steps(model, optimizer, 0, 4)
    again = copy.deepcopy(model)
    resumed = paper.AdamW(again.named_parameters(), seed=2, **keywords)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 4, 8)
    steps(again, resumed, 4, 8)
    assert torch.equal(model.w, again.w)


def test_deferred_step_rounds_as_the_fused_one() -> None:
    fused, deferred = (trained(7, seed=3, step_in_backward=inside, update_proj_gap=3)[0] for inside in (True, False))
    assert torch.equal(fused.w, deferred.w)


def test_fp32_weights_are_not_rounded() -> None:
    """Nor are fp32 moments of bf16 weights."""
    first, second = (trained(4, model=same(), stochastic_rounding=stochastic)[0] for stochastic in (False, True))
    assert torch.equal(first.w, second.w)
    model, optimizer = trained(1)
    assert optimizer.state[model.w]["exp_avg"].dtype is torch.float32
    assert not torch.equal(optimizer.state[model.w]["exp_avg"], optimizer.state[model.w]["exp_avg"].bfloat16().float())


def same() -> nn.Module:
    torch.manual_seed(0)
    return forms.Linear()

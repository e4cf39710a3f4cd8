"""AdamW with moments of 8 bits: the scale of its codes, the formula with a table of the codes, and training."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError, StateError
from grass_compile.optim.rules import AdamW8bitRule
from grass_compile.optim.rules.adamw8bit import positive_codes, positive_values, signed_codes, signed_values

from .. import paper
from ..compact import Net, State, backward, check
from ..pairs import every_pair

AXES = ("rows", "columns")

# ------------------------------------------------------------------------------------------------------------- the scale

shares = torch.logspace(-12, 0, 400_001, dtype=torch.float64)


def through_codes(share: Tensor) -> tuple[Tensor, Tensor]:
    """First moments, and roots of second moments, as they come back from their codes."""
    one = torch.ones_like(share)
    first = signed_values(signed_codes(share, one), one)
    second = positive_values(positive_codes(share**2, one), one)
    return first, second.sqrt()


@pytest.mark.parametrize(
    ("least", "first", "second"), [(0.99, 0.016, 0.008), (0.01, 0.05, 0.025), (1e-3, 0.085, 0.045), (1e-4, 0.15, 0.081)]
)
def test_errors_are_those_of_the_docstring(least: float, first: float, second: float) -> None:
    share = shares[shares >= least]
    for found, bound in zip(through_codes(share), (first, second), strict=True):
        worst = float(((found - share) / share).abs().max())
        assert 0.9 * bound < worst < bound or (least == 0.99 and worst < bound)
    assert f"{100 * second:.1f} %" in str(AdamW8bitRule.__doc__)


def test_small_moments() -> None:
    """A first moment never more than doubles; a second moment that is not zero does not become zero."""
    first, second = through_codes(shares)
    assert float((first / shares).max()) <= 2 + 1e-12 and bool((first[shares < 1.9e-9] == 0).all())
    assert bool((second > 0).all())
    one = torch.ones(3)
    assert positive_codes(torch.tensor([0.0, 1e-38, 1.0]), one).tolist() == [0, 1, 255]
    assert signed_codes(torch.tensor([-1.0, 0.0, 1.0]), one).tolist() == [-127, 0, 127]
    zero = torch.zeros(3)
    assert not signed_codes(zero, zero).any() and not positive_codes(zero, zero).any()
    assert not signed_values(signed_codes(zero, zero), zero).any() and not positive_values(positive_codes(zero, zero), zero).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_come_back(dtype: torch.dtype) -> None:
    """Quantising what was dequantised changes nothing, whatever the largest is."""
    for largest in (1.0, 3e-7, 12345.6):
        signed = torch.arange(-127, 128).to(torch.int8)
        top = torch.full(signed.shape, largest, dtype=dtype)
        assert torch.equal(signed_codes(signed_values(signed, top), top), signed)
        positive = torch.arange(256).to(torch.uint8)
        top = torch.full(positive.shape, largest, dtype=dtype)
        assert torch.equal(positive_codes(positive_values(positive, top), top), positive)


def test_infinite_moment_spoils_its_block_and_says_so() -> None:
    """A gradient that is not finite must not turn into codes that look like any others."""
    rule = AdamW8bitRule(block_size=4)
    gradient = torch.ones(1, 8)
    gradient[0, 1] = float("inf")
    names = rule.state_names
    state = {n: torch.zeros(rule.shape(n, 1, 8), dtype=rule.state_dtypes.get(n, torch.float32)) for n in names}
    hyper = dict(zip(rule.hyper_names, torch.tensor(rule.hyper({**rule.defaults})), strict=True))
    _, state = rule.update(gradient, {**state, "step": torch.tensor(1.0)}, hyper)
    update, _ = rule.update(torch.ones(1, 8), {**state, "step": torch.tensor(2.0)}, hyper)
    assert update[0, :4].isfinite().logical_not().all() and update[0, 4:].isfinite().all()


# ----------------------------------------------------------------------------------------------------------- the formula


def from_table(values: Tensor, table: Tensor, block: int, power: int) -> Tensor:
    """Each value as the table has it next, block by block: nearest in the ``power``-th root; zero for zero alone if that is not
    the value itself."""
    result = torch.zeros_like(values)
    roots = table.abs() ** (1 / power) * table.sign()
    for row in range(values.shape[0]):
        for start in range(0, values.shape[1], block):
            part = values[row, start : start + block]
            if (top := part.abs().max()) > 0:
                distance = (((part / top).abs() ** (1 / power) * part.sign()).unsqueeze(1) - roots).abs()
                if power > 1:
                    distance[:, 0][part > 0] = float("inf")
                result[row, start : start + block] = top * table[distance.argmin(1)]
    return result


SIGNED = torch.tensor([(c > 0) - (c < 0) for c in range(-127, 128)]) * (torch.arange(-127, 128, dtype=torch.float64) / 127) ** 4
POSITIVE = (torch.arange(256, dtype=torch.float64) / 255) ** 8


def adamw8bit(lr: float, block: int) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
    """AdamW whose moments are looked up in the tables after each step."""

    def formula(gradient: Tensor, state: State, steps: Tensor) -> tuple[Tensor, State]:
        exp_avg = 0.9 * state.get("m", torch.zeros_like(gradient)) + 0.1 * gradient
        exp_avg_sq = 0.99 * state.get("v", torch.zeros_like(gradient)) + 0.01 * gradient**2
        corrected = exp_avg_sq / (1 - 0.99**steps)
        update = lr * exp_avg / (1 - 0.9**steps) / (corrected.sqrt() + 1e-8)
        return update, {"m": from_table(exp_avg, SIGNED, block, 1), "v": from_table(exp_avg_sq, POSITIVE, block, 8)}

    return formula


KEYWORDS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8)


@pytest.mark.parametrize("block", [8, 10, 128])  # divides the features, does not, is larger
@pytest.mark.parametrize("axis", AXES)
def test_full_rank_equals_the_formula(axis: str, block: int) -> None:
    check(AdamW8bitRule(block), adamw8bit(1e-2, block), axis=axis, rank=24, gap=100, steps=20, **KEYWORDS)


@every_pair(axis=AXES, on_refresh=["reset", "carry", "keep"], deferred=[False, True])
def test_selected_rows_equal_the_formula(axis: str, on_refresh: str, deferred: bool) -> None:
    """Codes and largest magnitudes go with their rows."""
    keywords = {**KEYWORDS, "step_in_backward": not deferred}
    model, optimizer = check(AdamW8bitRule(10), adamw8bit(1e-2, 10), axis=axis, on_refresh=on_refresh, **keywords)
    state, (m, n) = optimizer.state[model.a.weight], model.a.weight.shape
    assert state["exp_avg"].dtype == torch.int8 and state["exp_avg_sq"].dtype == torch.uint8
    assert state["exp_avg"].shape == ((8, n) if axis == "rows" else (m, 8))
    assert state["exp_avg_max"].shape == state["exp_avg_sq_max"].shape == (8, -(-(n if axis == "rows" else m) // 10))


@pytest.mark.inductor
@pytest.mark.parametrize(("axis", "block"), [pytest.param("rows", 12, marks=pytest.mark.exhaustive), ("columns", 10)])
def test_selected_rows_equal_the_formula_under_inductor(axis: str, block: int) -> None:
    """Blocks of 10 do not fill 24 features, of 12 do."""
    rule, formula = AdamW8bitRule(block), adamw8bit(1e-2, block)
    check(rule, formula, axis=axis, on_refresh="carry", steps=7, compiler="inductor", **KEYWORDS)


# -------------------------------------------------------------------------------------------------------------- training


def train(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Any, steps: range) -> list[float]:
    dtype, losses = next(model.parameters()).dtype, []
    for step in steps:
        losses.append(backward(forward, step, dtype))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="grass", options={"compiler": "aot_eager"})


@pytest.mark.parametrize("axis", AXES)
def test_full_rank_follows_torchs_adamw(axis: str) -> None:
    """20 steps: the distance from ``torch.optim.AdamW`` is a small part of the way."""
    model = Net()
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = paper.AdamW8bit(model.named_parameters(), lr=1e-2, weight_decay=0.1, rank=24, axis=axis)
    train(model, optimizer, compiled(model), range(20))
    train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1), twin, range(20))
    for name in ("a.weight", "b.weight"):
        begin, mine, theirs = (dict(net.named_parameters())[name].detach() for net in (start, model, twin))
        error = float((mine - theirs).norm() / (theirs - begin).norm())
        assert 0 < error < 0.03, (name, error)
    assert optimizer.state[model.a.bias]["exp_avg"].dtype == torch.float32  # the dense rest


class BlockwiseAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose moments pass through bitsandbytes' 8-bit codes after each step, as in its AdamW8bit."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        functional = pytest.importorskip("bitsandbytes.functional")
        super().step()
        for state in self.state.values():
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                code = functional.create_dynamic_map(signed=signed)
                codes, scale = functional.quantize_blockwise(state[name], code=code, blocksize=128)
                state[name].copy_(functional.dequantize_blockwise(codes, scale).view_as(state[name]))


class Regression(nn.Module):
    """Features of very different sizes, as a transformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.logspace(-1.5, 1.0, 192))
        self.a, self.b = nn.Linear(192, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x * self.sizes)))  # type: ignore[no-any-return]


def test_regression_ends_where_adamw_ends() -> None:
    """200 steps: a loss within 5 % of full AdamW's, and no further from its weights than bitsandbytes' codes lead."""
    generator = torch.Generator().manual_seed(3)
    data = [torch.randn(32, 192, generator=generator) for _ in range(8)]
    target = torch.randn(192, 16, generator=generator) / 14
    torch.manual_seed(2)
    start = Regression()

    def run(make: Callable[[Any], torch.optim.Optimizer], grass: bool = False) -> tuple[float, Tensor]:
        model = copy.deepcopy(start)
        optimizer, forward = make(model), compiled(model) if grass else model
        for step in range(200):
            x = data[step % 8]
            (forward(x) - x @ target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            loss = sum(float((model(x) - x @ target).square().mean()) for x in data)
        return loss, torch.cat([p.detach().flatten() for p in model.parameters()])

    exact, weights = run(lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0))
    ours, mine = run(
        lambda model: paper.AdamW8bit(model.named_parameters(), lr=2e-3, rank=192, axis="rows", update_proj_gap=500), True
    )
    assert abs(ours - exact) < 0.05 * exact, (ours, exact)
    _, theirs = run(lambda model: BlockwiseAdamW(model.parameters(), lr=2e-3, weight_decay=0.0))
    assert float((mine - weights).norm()) < float((theirs - weights).norm())


def make(model: nn.Module, **keywords: Any) -> grass_compile.AdamW8bit:
    keywords = {"rank": 6, "axis": "rows", "update_proj_gap": 3, "on_refresh": "carry", "lr": 1e-2, **keywords}
    return paper.AdamW8bit(model.named_parameters(), **keywords)


@pytest.mark.parametrize("axis", AXES)
def test_resumed_run_is_the_same_bit_for_bit(axis: str) -> None:
    model = Net()
    optimizer, forward = make(model, axis=axis), compiled(model)
    train(model, optimizer, forward, range(4))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    expected = train(model, optimizer, forward, range(4, 10))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = Net()
    resumed.load_state_dict(weights)
    again = make(resumed, axis=axis)
    again.load_state_dict(state)
    torch._dynamo.reset()
    assert train(resumed, again, compiled(resumed), range(4, 10)) == expected
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, again.state[q][name]) if isinstance(value, Tensor) else value == again.state[q][name]


def test_dense_state_of_the_rule_keeps_its_dtypes() -> None:
    """Torch would turn all state into the parameter's dtype."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Net().to(torch.bfloat16)
        runs.append((model, paper.Optimizer(model.named_parameters(), "adamw8bit", rank=6, axis="rows", lr=1e-2)))
    (model, optimizer), (resumed, again) = runs
    forward = compiled(model)
    train(model, optimizer, forward, range(3))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(model.state_dict())
    assert again.state[resumed.a.bias]["exp_avg"].dtype == torch.int8
    assert again.state[resumed.a.bias]["exp_avg_max"].dtype == torch.float32
    expected = train(model, optimizer, forward, range(3, 6))
    torch._dynamo.reset()
    assert train(resumed, again, compiled(resumed), range(3, 6)) == expected
    assert torch.equal(model.a.bias, resumed.a.bias)


def test_bytes_of_the_state() -> None:
    model = nn.Linear(1000, 64, bias=False)
    optimizer = paper.AdamW8bit(model.named_parameters(), rank=16, axis="rows")
    compiled(model)(torch.randn(3, 1000)).sum().backward()
    state = optimizer.state[model.weight]
    names = optimizer.rule.state_names
    assert sum(state[name].numel() * state[name].element_size() for name in names) == 16 * (2 * 1000 + 8 * 8)
    report = grass_compile.explain(model, torch.randn(3, 1000), optimizer=optimizer)
    assert report.state_bytes.compact == 16 * (2 * 1000 + 8 * 8) and report.state_bytes.dense == 8 * 64 * 1000


def test_bf16_weights() -> None:
    model = Net().to(torch.bfloat16)
    optimizer = make(model, stochastic_rounding=True, seed=1)
    losses = train(model, optimizer, compiled(model), range(30))
    assert losses[-1] < 0.7 * losses[0]
    state = optimizer.state[model.a.weight]
    assert state["exp_avg"].dtype == torch.int8 and state["exp_avg_max"].dtype == torch.float32


def test_refusals() -> None:
    model = Net()
    with pytest.raises(ConfigError, match=r"state_dtype=torch\.bfloat16: the state of AdamW8bit is quantised by its rule"):
        make(model, state_dtype=torch.bfloat16)
    train(model, full := paper.AdamW(model.named_parameters(), rank=6, axis="rows"), compiled(model), range(2))
    other = Net()
    with pytest.raises(StateError, match="lacks"):
        make(other, on_refresh="reset").load_state_dict(full.state_dict())

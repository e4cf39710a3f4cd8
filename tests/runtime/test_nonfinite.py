"""Gradients that are not finite: the step of their weight is as if it had not been, and is reported by name."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile
from grass_compile import ConfigError, NonFiniteError, StateError, ops
from grass_compile.math import finite
from grass_compile.math.selection import SAMPLED
from grass_compile.runtime import nonfinite

from .. import paper
from ..pairs import every_pair

NAN, INF = float("nan"), float("inf")
PROJECT: dict[str, Any] = dict(rank=6, axis="rows", update_proj_gap=3)
BOTH = {"a": NAN, "b": NAN}


class Net(nn.Module):
    """Two layers side by side, so that either gradient can be spoilt alone; a layer's loss is multiplied by its factor."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 32, bias=bias), nn.Linear(24, 32, bias=bias)

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        losses = torch.stack([layer(x).float().square().mean() for layer in (self.a, self.b)])
        return (losses * factors).sum()


def net(dtype: torch.dtype = torch.float64, bias: bool = True) -> Net:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Net(bias).to(dtype)


def compiled(model: nn.Module, compiler: str = "aot_eager", **options: Any) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = torch.compile(model, backend="grass", options={"compiler": compiler, **options})
    return function


def batch(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(7, 24, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def factors(spoilt: dict[str, float] | None = None) -> Tensor:
    return torch.tensor([(spoilt or {}).get(name, 1.0) for name in "ab"])


def bits(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies that compare equal only if every bit is, signs of zeros included."""
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in tensors.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """For each parameter, its value and its state, but for the counts of steps that were asked for and skipped."""
    found = {}
    for name, parameter in model.named_parameters():
        state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if key not in ("nonfinite", "updates")}
        found[name] = bits({"value": parameter, **state})
    return found


def changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> set[str]:
    """Names of the parameters of which anything differs."""
    found = set()
    for name, entry in before.items():
        for key, value in entry.items():
            other = after[name][key]
            if not (same_bits(value, other) if isinstance(value, Tensor) else value == other):
                found.add(name)
    return found


def skipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How often each projected weight was skipped."""
    return {n: int(optimizer.state[p]["nonfinite"]) for n, p in model.named_parameters() if "index" in optimizer.state.get(p, {})}


class Run:
    """A model, an optimizer and a way to train: ``fused``, ``deferred`` or ``accumulated``."""

    def __init__(
        self,
        mode: str = "fused",
        *,
        make: Any = None,
        dtype: torch.dtype = torch.float64,
        compiler: str = "aot_eager",
        **keywords: Any,
    ) -> None:
        self.mode, self.dtype, self.model = mode, dtype, net(dtype)
        asked = {"lr": 1e-2, **PROJECT, "step_in_backward": mode != "deferred", **keywords}
        self.optimizer = (make or paper.AdamW)(self.model.named_parameters(), **asked)
        self.compiled = compiled(self.model, compiler)

    def backward(self, seed: int, spoilt: dict[str, float] | None = None) -> None:
        """Of a batch; accumulated, of its two halves, the second of which is spoilt."""
        x = batch(seed, self.dtype)
        if self.mode == "accumulated":
            with self.optimizer.accumulate():
                self.compiled(x, factors()).backward()
        self.compiled(x.flip(0), factors(spoilt)).backward()

    def step(self, seed: int, spoilt: dict[str, float] | None = None) -> NonFiniteError | None:
        """One step; returns what was raised."""
        self.backward(seed, spoilt)
        error = None
        try:
            self.optimizer.step()
        except NonFiniteError as raised:
            error = raised
        self.optimizer.zero_grad()
        return error

    def steps(self, seeds: Iterable[int], bad: Collection[int] = (), spoilt: dict[str, float] | None = None) -> None:
        for seed in seeds:
            assert (self.step(seed, spoilt or BOTH if seed in bad else None) is not None) == (seed in bad)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        return snapshot(self.model, self.optimizer)


MODES = ["fused", "deferred", "accumulated"]


# ------------------------------------------------------------------------------------------ one weight, the others go on


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 1, 3], ids=["first", "regular", "refresh"])
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_stays_and_the_others_go_on(mode: str, at: int, value: float) -> None:
    run = Run(mode, weight_decay=0.1)
    run.steps(range(at))
    before = run.snapshot()
    error = run.step(at, {"b": value})
    moved = changed(before, run.snapshot())
    assert moved == {"a.weight", "a.bias"}
    assert "b.weight (1 step)" in str(error) and "b.bias (1 step)" in str(error) and "a." not in str(error)
    assert skipped(run.model, run.optimizer) == {"a.weight": 0, "b.weight": 1}
    before = run.snapshot()
    assert run.step(at + 1) is None
    assert changed(before, run.snapshot()) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_skip_says_nothing_and_counts(mode: str) -> None:
    run = Run(mode, nonfinite="skip")
    for seed in range(8):
        before = run.snapshot()
        assert run.step(seed, {"b": INF} if seed in (0, 3, 4) else None) is None
        assert ("b.weight" in changed(before, run.snapshot())) == (seed not in (0, 3, 4))
    assert skipped(run.model, run.optimizer) == {"a.weight": 0, "b.weight": 3}


@pytest.mark.parametrize("mode", MODES)
def test_propagate_is_as_in_torch(mode: str) -> None:
    run = Run(mode, nonfinite="propagate")
    assert run.step(0) is None and run.step(1, {"b": NAN}) is None
    assert run.model.a.weight.isfinite().all() and run.model.a.bias.isfinite().all()
    state = run.optimizer.state[run.model.b.weight]
    assert run.model.b.weight[state["index"]].isnan().all() and run.model.b.bias.isnan().all()
    assert state["exp_avg"].isnan().all() and skipped(run.model, run.optimizer) == {"a.weight": 0, "b.weight": 0}


# -------------------------------------------------------------------------------- as if the step had not happened at all


HOW: dict[str, dict[str, Any]] = {
    "reset": {},
    "carry": {"on_refresh": "carry", "weight_decay": 0.1},
    "keep": {"on_refresh": "keep"},
    "columns": {"axis": "columns", "on_refresh": "carry"},
    "drawn": {"selection": "norm", "seed": 3, "on_refresh": "carry"},
    "blind": {"selection": "uniform", "seed": 3, "on_refresh": "carry"},
    "blind columns": {"selection": "uniform", "seed": 3, "axis": "columns"},
    "decayed": {"selection": "norm", "seed": 3, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.05},
    "bf16 moments": {"state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("how", [how for how in HOW if "blind" not in how])
@pytest.mark.parametrize("mode", MODES)
def test_equals_a_run_without_that_step(mode: str, how: str) -> None:
    """Of steps at which rows are due, the first included: they remain due, and the schedule is that of the run without them."""
    one, other = Run(mode, **HOW[how]), Run(mode, **HOW[how])
    one.steps(range(9), bad={0, 4})
    other.steps(seed for seed in range(9) if seed not in (0, 4))
    assert changed(one.snapshot(), other.snapshot()) == set()
    assert skipped(one.model, one.optimizer) == {"a.weight": 2, "b.weight": 2}
    assert one.optimizer.state[one.model.a.weight]["updates"] == other.optimizer.state[other.model.a.weight]["updates"] == 7


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_equals_a_run_without_a_regular_step(mode: str, how: str) -> None:
    """The bias correction that follows is that of the updates that happened."""
    one, other = (Run(mode, **{**HOW[how], "update_proj_gap": 100}) for _ in range(2))
    one.steps(range(6), bad={1, 2, 4})
    other.steps(seed for seed in range(6) if seed not in (1, 2, 4))
    assert changed(one.snapshot(), other.snapshot()) == set()
    assert one.optimizer.state[one.model.a.weight]["updates"] == 6


@pytest.mark.parametrize("keywords", [dict(on_refresh="carry"), dict(axis="columns")])
@pytest.mark.parametrize("mode", MODES)
def test_a_blind_refresh_that_is_skipped_keeps_what_it_drew(mode: str, keywords: dict[str, Any]) -> None:
    """The rows and the schedule are those of a run without fault, the weight stays as it was, and no moment is spoilt."""
    run, twin = (Run(mode, selection="uniform", seed=3, **keywords) for _ in range(2))
    for seed in range(9):
        fails = seed in (0, 3, 4)
        before = run.snapshot()
        error = run.step(seed, {"b": NAN} if fails else None)
        assert twin.step(seed) is None and ("b.weight (1 step)" in str(error)) == fails
        states = [one.optimizer.state[one.model.b.weight] for one in (run, twin)]
        for key in ("index", "row_scale", "updates"):
            assert (states[0][key] == states[1][key]) if key == "updates" else torch.equal(states[0][key], states[1][key])
        if seed in (0, 3) and keywords.get("on_refresh") != "carry":  # new rows, which no gradient has reached
            assert not states[0]["exp_avg"].any() and not states[0]["step"].any()
        moved = (run.model.b.weight.detach() - before["b.weight"]["value"]).abs().sum(1 - states[0]["dim"]).nonzero().flatten()
        assert moved.tolist() == ([] if fails else states[0]["index"].tolist())
    assert skipped(run.model, run.optimizer) == {"a.weight": 0, "b.weight": 3}
    assert all(bool(tensor.isfinite().all()) for tensor in states[0].values() if isinstance(tensor, Tensor))


def test_a_blind_refresh_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the counts of skipped steps come a step later; only where they decide whether a refresh is due are they waited
    for."""
    waits: list[bool] = []
    look = nonfinite.Skips.look

    def watched(self: nonfinite.Skips, counts: Any, now: bool) -> Any:
        waits.append(now)
        return look(self, counts, now)

    monkeypatch.setattr(nonfinite.Skips, "look", watched)
    for selection, expected in (("uniform", [False] * 5), ("norm", [True, False, False, True, False])):
        waits.clear()
        Run(selection=selection, seed=0).steps(range(5))
        assert waits == expected


def test_a_skipped_step_does_not_move_the_schedule() -> None:
    """``updates`` counts it, so that weights which skip refresh at the same step as those which do not."""
    run = Run()
    for seed in range(7):
        before = {layer: run.optimizer.state[layer.weight].get("index") for layer in (run.model.a, run.model.b)}
        before = {layer: index.clone() for layer, index in before.items() if index is not None}
        run.step(seed, {"b": NAN} if seed in (1, 2) else None)
        for layer, index in before.items():
            assert torch.equal(run.optimizer.state[layer.weight]["index"], index) == (seed % 3 != 0)


RULES: dict[str, Any] = {
    "AdamW": paper.AdamW,
    "SGD": lambda params, **keywords: paper.SGD(params, momentum=0.9, **keywords),
    "Adafactor": paper.Adafactor,
    "Lion": paper.Lion,
    "Muon": paper.Muon,
    "SONew": lambda params, **keywords: paper.Optimizer(params, "sonew", **keywords),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("axis", "on_refresh"), [("rows", "reset"), ("columns", "carry")])
def test_every_rule(rule: str, axis: str, on_refresh: str) -> None:
    one, other = (Run(make=RULES[rule], axis=axis, on_refresh=on_refresh, weight_decay=0.1) for _ in range(2))
    one.steps(range(8), bad={0, 4})
    other.steps(seed for seed in range(8) if seed not in (0, 4))
    assert changed(one.snapshot(), other.snapshot()) == set()


@pytest.mark.parametrize(
    ("mode", "compiler"),
    [
        ("fused", "aot_eager"),
        ("deferred", "aot_eager"),
        pytest.param("fused", "inductor", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
        pytest.param("deferred", "inductor", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
    ],
)
def test_no_bit_changes_in_bf16(mode: str, compiler: str) -> None:
    """Not the sign of a zero, not by rounding stochastically, not by decay."""
    keywords = dict(dtype=torch.bfloat16, weight_decay=0.5, stochastic_rounding=True, state_dtype=torch.bfloat16, seed=1)
    run = Run(mode, compiler=compiler, **keywords)
    with torch.no_grad():
        run.model.b.weight[:, ::2] = -0.0
    for seed in range(5):
        before, fails = run.snapshot(), seed in (0, 2, 3)
        error = run.step(seed, {"b": NAN if seed else INF} if fails else None)
        assert ("b.weight" in str(error)) == fails and ("b.weight" in changed(before, run.snapshot())) != fails
        assert "a.weight" in changed(before, run.snapshot())
    assert skipped(run.model, run.optimizer) == {"a.weight": 0, "b.weight": 3}


@pytest.mark.inductor
@pytest.mark.exhaustive
def test_inductor_equals_a_run_without_that_step() -> None:
    keywords = dict(compiler="inductor", dtype=torch.float32, weight_decay=0.1, max_grad_norm=0.05, on_refresh="carry")
    one, other = Run(**keywords), Run(**keywords)
    one.steps(range(6), bad={0, 4})
    other.steps(seed for seed in range(6) if seed not in (0, 4))
    assert changed(one.snapshot(), other.snapshot()) == set()


def test_a_square_that_overflows_is_not_finite() -> None:
    """1e20 is a number in fp32, but the second moment that it would make is not, and no later step would move those rows."""
    run = Run(dtype=torch.float32)
    run.steps(range(2))
    before = run.snapshot()
    assert "b.weight (1 step)" in str(run.step(2, {"b": 1e22}))
    assert changed(before, run.snapshot()) == {"a.weight", "a.bias"}


# ------------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("value", [NAN, INF, 1e22])
@pytest.mark.parametrize("mode", ["fused", "deferred"])
def test_clipping_leaves_what_is_not_finite_out_of_the_norm(mode: str, value: float) -> None:
    """The others are clipped as if the gradients of that layer were zero; what overflows is not scaled back into range."""
    keywords = dict(dtype=torch.float32, max_grad_norm=1e-5)
    one, other = Run(mode, **keywords), Run("deferred", **keywords)
    before = snapshot(one.model, one.optimizer)
    for run, spoilt in ((one, value), (other, 0.0)):
        assert (run.step(0, {"b": spoilt}) is None) == (run is other)
    norm, expected = one.optimizer.grad_norm, other.optimizer.grad_norm
    assert norm is not None and expected is not None
    torch.testing.assert_close(norm, expected)
    assert float(norm) > 1e-5
    torch.testing.assert_close(one.model.a.weight, other.model.a.weight, rtol=0, atol=1e-7)
    assert changed(before, snapshot(one.model, one.optimizer)) == {"a.weight", "a.bias"}


def test_clipping_by_ones_own_hand_spreads_as_in_torch() -> None:
    """A norm that is NaN makes every gradient NaN: all are skipped."""
    run = Run("deferred")
    run.steps(range(2))
    run.backward(2, {"b": NAN})
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    before = run.snapshot()
    with pytest.raises(NonFiniteError, match=r"a.weight \(1 step\).*b.weight \(1 step\)"):
        run.optimizer.step()
    assert changed(before, run.snapshot()) == set()


def test_the_optimizers_own_clipping_does_not_spread() -> None:
    run = Run("deferred")
    run.steps(range(2))
    run.backward(2, {"b": NAN})
    assert run.optimizer.clip_grad_norm_(1e-3).isfinite()
    before = run.snapshot()
    with pytest.raises(NonFiniteError, match=r"b\.weight"):
        run.optimizer.step()
    assert changed(before, run.snapshot()) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("order", [2.0, 1.0, INF, -1.0, -INF])
def test_clipping_sound_gradients_is_torchs(order: float) -> None:
    gradients = [torch.randn(4, 6), torch.randn(3), torch.randn(2, 2).double()]
    expected = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(expected, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.5, order)
    spoilt = torch.tensor([1.0, NAN])
    torch.testing.assert_close(finite.clip_([*gradients, spoilt], 0.5, order), norm, check_dtype=False)
    assert spoilt.isnan().all()
    for parameter, gradient in zip(expected, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


# ------------------------------------------------------------------------------------------------------------ a refresh


@every_pair(dim=[0, 1], chosen_by=["top", *SAMPLED], kind=["nan", "inf", "zero", "one nan"], checked=[True, False])
def test_rows_are_valid(dim: int, chosen_by: str, kind: str, checked: bool) -> None:
    """Unchecked, a refresh chooses distinct rows from whatever it gets; checked, it does so from a sound gradient alone."""
    gradient = torch.full((10, 12), {"nan": NAN, "inf": INF}.get(kind, 0.0))
    if kind == "one nan":
        gradient = torch.randn(10, 12).abs()
        gradient[9, 11] = NAN
    rank, length, old = 4, gradient.shape[dim], torch.tensor([1, 2, 5, 8])
    shape = [rank if d == dim else size for d, size in enumerate(gradient.shape)]
    index, moment, step = old.clone(), torch.ones(shape), torch.tensor(7.0)
    noise = None if chosen_by == "top" else torch.rand(length).clamp(1e-6, 1 - 1e-6)
    compact = ops.refresh_(gradient, index, noise, [step, moment], dim, rank, "reset", chosen_by, "sf", checked)
    assert len(index.unique()) == rank and int(index.min()) >= 0 and int(index.max()) < length
    assert compact.shape == moment.shape
    if checked and kind != "zero":
        assert compact.isnan().all() and torch.equal(index, old)
        assert float(step) == 7.0 and bool((moment == 1.0).all())
    else:
        assert torch.equal(compact, gradient.index_select(dim, index)) or not gradient.isfinite().all()
        assert not step.any() and not moment.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selection", ["top", "uniform"])
def test_a_refresh_looks_at_the_gradient_that_it_chooses_by(mode: str, selection: str) -> None:
    """One row that is not finite spoils a choice by norms, be it chosen or not. A blind draw looks at the rows that it takes, as
    every other step does."""
    run, twin = (Run(mode, selection=selection, seed=0, nonfinite="skip") for _ in range(2))
    run.steps(range(3))
    twin.steps(range(4))
    chosen = twin.optimizer.state[twin.model.b.weight]["index"].tolist()
    row = min(set(range(32)) - set(chosen))
    before = run.snapshot()
    with torch.no_grad():
        run.model.b.bias[row] = INF  # makes this row of the gradient infinite, and no other
    run.backward(3)
    run.optimizer.step()
    after = run.snapshot()
    if selection == "uniform":
        assert after["b.weight"]["index"].tolist() == chosen
        assert {"a.weight", "b.weight"} <= changed(before, after) and bool(after["b.weight"]["value"].isfinite().all())
        return
    assert same_bits(before["b.weight"]["index"], after["b.weight"]["index"])
    assert "b.weight" not in changed(before, after) and "a.weight" in changed(before, after)
    assert run.optimizer.state[run.model.b.weight]["updates"] == 3


# ---------------------------------------------------------------------------------------------- the rest of the contract


def test_error_is_two_others_and_says_what_to_do() -> None:
    run = Run()
    error = run.step(0, BOTH)
    assert isinstance(error, StateError) and isinstance(error, FloatingPointError)
    assert (
        "a.weight (1 step), b.weight (1 step)" in str(error) and "zero_grad()" in str(error) and "nonfinite='skip'" in str(error)
    )


def test_a_long_list_is_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(10)))
    optimizer = paper.AdamW(model.named_parameters(), rank=2)
    compiled(model)(torch.full((3, 8), NAN)).sum().backward()
    with pytest.raises(NonFiniteError, match="and 2 more"):
        optimizer.step()


def test_gradients_that_stay_go_on_being_reported() -> None:
    """Without ``zero_grad`` the next gradient adds to what is not finite."""
    run = Run("deferred")
    for seed in range(3):
        run.backward(seed, BOTH if seed == 0 else None)
        with pytest.raises(NonFiniteError, match=r"a.weight \(1 step\)"):
            run.optimizer.step()
    run.optimizer.zero_grad()
    assert run.step(3) is None


@pytest.mark.parametrize("mode", MODES)
def test_resume(mode: str) -> None:
    """Also of a state that was saved before there was a count, and with other counts of steps."""
    run = Run(mode)
    run.steps(range(3), bad={1})
    for old in (False, True):
        buffer = io.BytesIO()
        torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        if old:
            for entry in saved["optimizer"]["state"].values():
                entry.pop("nonfinite", None)
            for group in saved["optimizer"]["param_groups"]:
                del group["nonfinite"]
        other = Run(mode)
        other.model.load_state_dict(saved["model"])
        other.optimizer.load_state_dict(saved["optimizer"])
        twin = copy.deepcopy(run.snapshot())
        other.steps(range(3, 6))
        assert skipped(other.model, other.optimizer) == dict.fromkeys(("a.weight", "b.weight"), 0 if old else 1)
        assert "1 step)" in str(other.step(6, BOTH))
        assert changed(twin, run.snapshot()) == set()
    last = Run(mode)
    last.steps(range(3), bad={1})
    last.steps(range(3, 6))
    assert changed(last.snapshot(), other.snapshot()) == set()


def test_train_step_goes_on_after_the_error() -> None:
    model = net()
    optimizer = paper.AdamW(model.named_parameters(), step_in_backward=False, **PROJECT)
    step = grass_compile.train_step(optimizer, options={"compiler": "aot_eager"})(model)
    step(batch(0, torch.float64), factors())
    before = snapshot(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"b\.weight"):
        step(batch(1, torch.float64), factors({"b": NAN}))
    assert changed(before, snapshot(model, optimizer)) == {"a.weight", "a.bias"}
    step(batch(2, torch.float64), factors())
    assert changed(before, snapshot(model, optimizer)) == {"a.weight", "a.bias", "b.weight", "b.bias"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"nonfinite": "skp"}, r"nonfinite='skp' is not known. Did you mean 'skip'\?"),
        ({"nonfinite": None}, "nonfinite=None is not known"),
    ],
)
def test_unknown_answers_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paper.AdamW(net().named_parameters(), **keywords)


def test_it_belongs_to_the_optimizer_as_a_whole() -> None:
    model = net()
    groups = [{"params": list(model.a.parameters())}, {"params": list(model.b.parameters()), "nonfinite": "skip"}]
    with pytest.raises(ConfigError, match="nonfinite differs between parameter groups"):
        paper.AdamW(groups)


# ------------------------------------------------------------------------------------------------------------------ late


class Arrival:
    """What stands for the event of a copy from a GPU."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Arrival]:
    """Counts arrive as from a GPU, with an event that has to be waited for."""
    events: list[Arrival] = []

    def to_host(counts: Tensor) -> tuple[Tensor, Arrival]:
        events.append(Arrival())
        return counts.clone(), events[-1]

    monkeypatch.setattr(nonfinite, "to_host", to_host)
    return events


def test_late_counts_are_looked_at_one_step_later(late: list[Arrival]) -> None:
    run = Run(update_proj_gap=100)
    run.steps(range(2))
    assert not late[-1].waited
    before = run.snapshot()
    assert "b.weight" not in str(run.step(2, {"b": NAN})) and not late[-1].waited  # the bias is dense, and on the CPU
    assert "b.weight" not in changed(before, run.snapshot())
    assert "b.weight (1 step)" in str(run.step(3)) and late[-2].waited and not late[-1].waited
    assert run.step(4) is None


def test_late_counts_of_a_refresh_are_waited_for(late: list[Arrival]) -> None:
    """So that it can be made up for; what was skipped one step before it is not taken for it."""
    run = Run()
    for seed, spoilt, waits, updates in [
        (0, None, True, 1), (1, None, False, 2), (2, BOTH, False, 3), (3, None, True, 4), (4, None, False, 5),
        (5, None, False, 6), (6, BOTH, True, 6), (7, None, True, 7),
    ]:  # fmt: skip
        index = run.optimizer.state[run.model.a.weight].get("index", torch.zeros(6)).clone()
        error = run.step(seed, spoilt)
        assert ("a.weight" in str(error)) == (seed in (3, 6))
        assert late[-1].waited == waits, seed
        assert run.optimizer.state[run.model.a.weight]["updates"] == updates
        assert torch.equal(run.optimizer.state[run.model.a.weight]["index"], index) == (seed not in (0, 3, 7))


def test_dense_parameters_that_cannot_be_held_back_are_named(late: list[Arrival], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: they have taken the gradient by the time it is known, and the error says so."""
    monkeypatch.setattr(nonfinite, "_is_at_hand", lambda gradient: False)
    run = Run(update_proj_gap=100)
    run.steps(range(2))
    assert run.step(2, {"b": NAN}) is None
    assert run.model.b.bias.isnan().all() and run.model.b.weight.isfinite().all() and run.model.a.bias.isfinite().all()
    skips, _, takes = str(run.step(3)).partition("dense parameters")
    assert "b.weight (1 step)" in skips and "b.bias (1 step)" in takes and "a." not in skips + takes
    assert "training may go on" not in skips and "go back to a checkpoint" in takes
    with torch.no_grad():
        run.model.b.bias.zero_()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.step(4) is None and run.step(5) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reports_one_step_later() -> None:
    model = net(torch.float32, bias=False).cuda()
    optimizer = paper.AdamW(model.named_parameters(), **{**PROJECT, "update_proj_gap": 100})
    forward = compiled(model)
    for seed, spoilt, named in [(0, "a", "a"), (1, "", ""), (2, "b", ""), (3, "", "b"), (4, "", "")]:
        before = snapshot(model, optimizer)
        forward(batch(seed, torch.float32).cuda(), factors({spoilt: NAN}).cuda()).backward()
        with pytest.raises(NonFiniteError, match=rf"{named}\.weight \(1 step") if named else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()
        assert changed(before, snapshot(model, optimizer)) == {"a.weight", "b.weight"} - {f"{spoilt}.weight"}
    assert skipped(model, optimizer) == {"a.weight": 1, "b.weight": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for() -> None:
    """Neither by a regular step nor by a blind refresh, though the learning rate changes at every step."""
    model = net(torch.float32, bias=False).cuda()
    keywords = dict(PROJECT, selection="uniform", on_refresh="carry", stagger=True)
    optimizer = paper.AdamW(model.named_parameters(), **keywords)
    forward = compiled(model)
    inputs, weights = [batch(seed, torch.float32).cuda() for seed in range(12)], factors().cuda()
    try:
        for seed, x in enumerate(inputs):
            torch.cuda.set_sync_debug_mode("error" if seed >= 4 else "default")  # the first ones compile
            optimizer.param_groups[0]["lr"] *= 0.9
            forward(x, weights).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------- unmodified scripts


def adopted(
    make: Callable[..., torch.optim.Optimizer], **options: Any
) -> tuple[Net, torch.optim.Optimizer, Callable[..., Tensor]]:
    model = net(bias=False)
    options = {**paper.OPTIONS, "rank": 6, "axis": "rows", "update_proj_gap": 3, **options}
    return model, make(model.parameters(), lr=1e-2), compiled(model, **options)


def train(
    run: tuple[Net, torch.optim.Optimizer, Callable[..., Tensor]], seeds: Sequence[int], bad: Collection[int], raises: bool = True
) -> None:
    _, optimizer, forward = run
    for seed in seeds:
        forward(batch(seed, torch.float64), factors(BOTH if seed in bad else None)).backward()
        with pytest.raises(NonFiniteError, match=r"a\.weight") if raises and seed in bad else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_unmodified_scripts(nonfinite: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    """The step that takes the weights over, a regular one, and one at which rows are due."""
    one, other = (adopted(make, nonfinite=nonfinite) for _ in range(2))
    train(one, range(9), bad={0, 4}, raises=nonfinite == "raise")
    train(other, [seed for seed in range(9) if seed not in (0, 4)], bad={})
    assert skipped(one[0], one[1]) == {"a.weight": 2, "b.weight": 2}
    for (name, parameter), twin in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-12, atol=1e-12, msg=name)


def test_unmodified_scripts_resume() -> None:
    one = adopted(torch.optim.AdamW)
    train(one, range(5), bad={1})
    saved = copy.deepcopy((one[0].state_dict(), one[1].state_dict()))
    other = adopted(torch.optim.AdamW)
    other[0].load_state_dict(saved[0])
    other[1].load_state_dict(saved[1])
    for run in (one, other):
        train(run, range(5, 9), bad={7})
        assert skipped(run[0], run[1]) == {"a.weight": 2, "b.weight": 2}
    assert changed(snapshot(one[0], one[1]), snapshot(other[0], other[1])) == set()


def test_unmodified_scripts_may_propagate() -> None:
    run = adopted(torch.optim.AdamW, nonfinite="propagate")
    train(run, range(3), bad={1}, raises=False)
    assert run[0].a.weight.isnan().any()

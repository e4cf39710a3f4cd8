"""Which rows are chosen: the sampled selections against their probabilities, and whole training runs against the oracle."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import grass_compile
from grass_compile import ops
from grass_compile.math import selection

from .. import forms, paper
from ..harness import pair
from ..pairs import every_pair

SELECTIONS = ("top", *selection.SAMPLED)
DRAWS = 20_000


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def weights_of(kind: str, scores: Tensor) -> Tensor:
    return scores ** {"norm": 1, "uniform": 0}[kind]


@pytest.mark.parametrize("kind", selection.SAMPLED)
def test_draws_follow_successive_sampling(kind: str) -> None:
    """Every set of rows comes as often as drawing one row after another says; all sets of 2 of 5 are enumerated."""
    scores = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    weights = (weights_of(kind, scores) / weights_of(kind, scores).sum()).tolist()
    expected: dict[tuple[int, ...], float] = {}
    for first, second in itertools.permutations(range(5), 2):
        rows = tuple(sorted((first, second)))
        expected[rows] = expected.get(rows, 0.0) + weights[first] * weights[second] / (1 - weights[first])
    assert math.isclose(sum(expected.values()), 1.0)
    noise = uniforms(DRAWS, 5)
    chosen = torch.topk(selection.keys(kind, scores, noise), 2).indices.sort(dim=1).values
    assert chosen[7].tolist() == selection.select(kind, scores, noise[7], 2).tolist()
    for rows, probability in expected.items():
        count = int((chosen == torch.tensor(rows)).all(dim=1).sum())
        error = math.sqrt(DRAWS * probability * (1 - probability))
        assert abs(count - DRAWS * probability) < 4 * error + 1, (rows, count / DRAWS, probability)


def test_uniform_includes_every_row_alike() -> None:
    """With probability ``r/m``, so that ``m/r`` times the sum of what is drawn is unbiased."""
    noise = uniforms(DRAWS, 12, seed=1)
    chosen = torch.topk(selection.keys("uniform", torch.zeros(12), noise), 3).indices
    counts = torch.bincount(chosen.flatten(), minlength=12).double()
    assert ((counts - DRAWS / 4).abs() < 4 * math.sqrt(DRAWS * 0.25 * 0.75)).all()


@given(
    st.lists(st.sampled_from([0.0, 1.0, 1e-30, 1e30, math.inf, -0.0, math.nan, 3.0]), min_size=2, max_size=24),
    st.integers(1, 24),
    st.sampled_from(SELECTIONS),
    st.integers(0, 5),
)
def test_any_scores_give_distinct_rows(values: list[float], rank: int, kind: str, seed: int) -> None:
    scores, rank = torch.tensor(values), min(rank, len(values))
    rows = selection.select(kind, scores, uniforms(len(values), seed=seed).float(), rank)
    assert rows.shape == (rank,) and rows.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist())) and rows.min() >= 0 and rows.max() < len(values)


def test_noise_is_a_function_of_seed_parameter_and_update() -> None:
    def draw(*key: int, dtype: torch.dtype = torch.float64) -> Tensor:
        noise = torch.empty(1000, dtype=dtype)
        selection.fill_with_noise(noise, *key)
        return noise

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    torch.testing.assert_close(draw(1, 2, 3).float(), draw(1, 2, 3, dtype=torch.float32))
    for other in ((0, 2, 3), (1, 3, 2), (12, 3, 0), (1, 2, 4)):
        assert abs(float(torch.corrcoef(torch.stack((draw(1, 2, 3), draw(*other))))[0, 1])) < 0.15
    assert abs(float(draw(5, 0, 0).mean()) - 0.5) < 0.05


class TwoLayers(nn.Module):
    """Weights of 24 x 48 and 32 x 24, so that neither axis is as long as the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(48, 24), nn.Linear(24, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def batch(seed: int) -> Tensor:
    return torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(out: Tensor) -> Tensor:
    return (out - 1.0).square().mean()


@every_pair(kind=SELECTIONS, axis=["rows", "columns"], on_refresh=["reset", "carry", "keep"], deferred=[False, True])
def test_training_equals_the_oracle(kind: str, axis: str, on_refresh: str, deferred: bool) -> None:
    torch.manual_seed(0)
    run = pair(
        TwoLayers().double(), [batch(0)], rank=8, axis=axis, selection=kind, on_refresh=on_refresh, seed=3, weight_decay=0.1,
        step_in_backward=not deferred,
    )  # fmt: skip
    for step in range(8):
        run.step(loss_of, batch(step))
        assert run.difference() < 1e-10, step


@pytest.mark.parametrize("on_refresh", ["reset", "carry", "keep"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_staggered_refreshes_equal_the_oracle(axis: str, on_refresh: str) -> None:
    torch.manual_seed(0)
    run = pair(
        TwoLayers().double(), [batch(0)], rank=8, axis=axis, selection="norm", on_refresh=on_refresh, seed=1, stagger=3,
        update_proj_gap=6,
    )  # fmt: skip
    records = [record for record in run.optimizer._manager.records.values() if record.parameter.dim() == 2]
    assert [record.offset for record in records] == [0, 4]
    seen = []
    for step in range(14):
        seen.append(tuple(record.assigned is None or record.due for record in records))
        run.step(loss_of, batch(step))
        assert run.difference() < 1e-10, step
    assert [step for step in range(14) if seen[step][0]] == [0, 6, 12]
    assert [step for step in range(14) if seen[step][1]] == [0, 2, 8]


@every_pair(axis=["rows", "columns"], on_refresh=["reset", "carry", "keep"], nonfinite=["raise", "propagate"])
def test_each_weight_draws_blindly_at_a_time_of_its_own(axis: str, on_refresh: str, nonfinite: str) -> None:
    torch.manual_seed(0)
    run = pair(
        TwoLayers().double(), [batch(0)], rank=8, axis=axis, selection="uniform", on_refresh=on_refresh, seed=1, stagger=True,
        update_proj_gap=5, nonfinite=nonfinite,
    )  # fmt: skip
    for step in range(14):
        run.step(loss_of, batch(step))
        assert run.difference() < 1e-10, step
    assert [record.offset for record in run.optimizer._manager.records.values() if record.parameter.dim() == 2] == [0, 3]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a joint graph is traced and cut, and how many forwards and backwards are finished."""
    from grass_compile.passes import pipeline

    counts = {"transform": 0, "finish_forward": 0, "finish_backward": 0}

    def counting(name: str) -> Any:
        original = getattr(pipeline, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return count

    for name in counts:
        monkeypatch.setattr(pipeline, name, counting(name))
    return counts


def test_staggering_compiles_each_pattern_once(counts: dict[str, int]) -> None:
    """And traces nothing again, also where the step counts of weights meet and part."""
    model = TwoLayers()
    optimizer = paper.AdamW(model.named_parameters(), rank=8, axis="rows", stagger=2, update_proj_gap=4)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(17):
        loss_of(compiled(batch(step).float())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counts == {"transform": 1, "finish_forward": 4, "finish_backward": 4}  # both, neither, the first, the second


@pytest.mark.parametrize("keywords", [dict(on_refresh="carry"), dict(share_index=True)])
def test_drawing_blindly_needs_one_graph(keywords: dict[str, Any], counts: dict[str, int]) -> None:
    """A refresh is a regular step: what it takes depends on no gradient."""
    model = TwoLayers()
    optimizer = paper.AdamW(
        model.named_parameters(), rank=8, axis="columns", selection="uniform", stagger=True, update_proj_gap=3, **keywords
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    seen = set()
    for step in range(12):
        loss_of(compiled(batch(step).float())).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.add(tuple(tuple(state["index"].tolist()) for state in optimizer.state.values() if "index" in state))
    assert len(seen) > 6
    assert counts == {"transform": 1, "finish_forward": 1, "finish_backward": 1}


@pytest.mark.parametrize("on_refresh", ["reset", "carry", "keep"])
def test_backward_that_breaks_off_after_a_blind_draw_does_no_harm(on_refresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows have been drawn and the moments carried; the next backward draws the same, and carries them no further."""

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    runs = []
    for breaks in (False, True):
        torch.manual_seed(0)
        model = TwoLayers()
        optimizer = paper.AdamW(
            model.named_parameters(), rank=8, axis="rows", selection="uniform", on_refresh=on_refresh, update_proj_gap=2, seed=1
        )
        compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
        for step in range(7):
            if breaks and step == 4:
                with monkeypatch.context() as patch:
                    patch.setattr("grass_compile.ops.step.kernels", dict.fromkeys(ops.kernels, fail))
                    with pytest.raises(RuntimeError, match="out of memory"):
                        loss_of(compiled(batch(9).float())).backward()
                optimizer.zero_grad()
            loss_of(compiled(batch(step).float())).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("deferred", [False, True])
def test_resumed_run_draws_the_same_rows(deferred: bool) -> None:
    def make() -> tuple[nn.Module, grass_compile.AdamW, Any]:
        torch.manual_seed(0)
        model = TwoLayers()
        optimizer = paper.AdamW(
            model.named_parameters(), rank=8, axis="columns", selection="norm", on_refresh="carry", update_proj_gap=2,
            step_in_backward=not deferred,
        )  # fmt: skip
        return model, optimizer, torch.compile(model, backend="grass", options={"compiler": "aot_eager"})

    def train(model: nn.Module, optimizer: grass_compile.AdamW, compiled: Any, steps: range) -> None:
        for step in steps:
            loss_of(compiled(batch(step).float())).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = make()
    train(*whole, range(3))
    saved = copy.deepcopy((whole[0].state_dict(), whole[1].state_dict()))
    train(*whole, range(3, 9))
    torch.manual_seed(77)
    resumed = make()
    resumed[0].load_state_dict(saved[0])
    resumed[1].load_state_dict(saved[1])
    train(*resumed, range(3, 9))
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        if one.dim() == 2:
            assert torch.equal(whole[1].state[one]["index"], resumed[1].state[other]["index"])


def test_a_seed_is_drawn_unless_given() -> None:
    def seed(**keywords: Any) -> int:
        return int(paper.AdamW(forms.Linear().named_parameters(), rank=4, **keywords).param_groups[0]["seed"])

    torch.manual_seed(0)
    assert seed(selection="norm") != seed(selection="norm") and seed(selection="norm", seed=5) == 5 and seed() == 0


@pytest.mark.inductor
@pytest.mark.exhaustive
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_sampled_selection_under_inductor(axis: str) -> None:
    torch.manual_seed(0)
    run = pair(
        TwoLayers(), [batch(0).float()], compiler="inductor", rank=8, axis=axis, selection="norm", on_refresh="carry", seed=3,
        stagger=2,
    )  # fmt: skip
    for step in range(7):
        run.step(loss_of, batch(step).float())
    assert run.difference() < 1e-5


def test_adopted_optimizer_draws_too() -> None:
    torch.manual_seed(0)
    model = TwoLayers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {
        **paper.OPTIONS,
        "compiler": "aot_eager",
        "rank": 8,
        "axis": "rows",
        "selection": "uniform",
        "seed": 4,
        "update_proj_gap": 2,
    }
    compiled = torch.compile(model, backend="grass", options=options)
    indices = []
    for step in range(5):
        loss_of(compiled(batch(step).float())).backward()
        optimizer.step()
        optimizer.zero_grad()
        indices.append(optimizer.state[model.a.weight]["index"].clone())
    assert torch.equal(indices[0], indices[1]) and not torch.equal(indices[1], indices[2])


# ---------------------------------------------------------------------------------------------------- blocks of neighbours


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(SELECTIONS), st.integers(0, 5))
def test_blocks_are_chosen_as_rows_of_their_norms(count: int, taken: int, block: int, kind: str, seed: int) -> None:
    length, rank = count * block, min(taken, count) * block
    scores, noise = uniforms(length, seed=seed), uniforms(length, seed=seed + 10)
    rows = selection.select(f"{kind}/{block}", scores, noise, rank)
    norms = scores.square().view(-1, block).sum(1).sqrt()
    blocks = selection.select(kind, norms, noise[::block], rank // block)
    divisor = math.gcd(block, rank, length)
    assert divisor == block and rows.tolist() == [block * b + i for b in blocks.tolist() for i in range(block)]


@pytest.mark.parametrize(("rank", "length", "block"), [(6, 16, 2), (8, 12, 4), (8, 16, 8), (5, 16, 1), (8, 15, 1)])
def test_blocks_that_do_not_divide_are_smaller(rank: int, length: int, block: int) -> None:
    rows = selection.select("uniform/8", torch.zeros(length), uniforms(length), rank).view(-1, block)
    assert rows.unique().numel() == rank and int(rows.max()) < length
    assert torch.equal(rows, rows[:, :1] + torch.arange(block)) and not (rows[:, 0] % block).any()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 24, bias=False)
        with torch.no_grad():
            self.linear.weight.normal_(generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(
    ("kind", "scores"), [("uniform", "exact"), ("top", "exact"), ("norm", "exact"), ("top", "estimate"), ("norm", "sampled")]
)
def test_training_moves_blocks(kind: str, scores: Any, axis: Any, mode: bool) -> None:
    model = Layer()
    keywords: dict[str, Any] = {"selection": kind, "scores": scores, "axis": axis, "on_refresh": "reset", "stagger": False}
    optimizer = grass_compile.AdamW(
        model.parameters(), rank=8, block=4, weight_decay=0.0, seed=3, update_proj_gap=2, step_in_backward=mode, **keywords
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2, 32)
    dim = 0 if axis == "rows" else 1
    seen = set()
    for step in range(5):
        before = model.linear.weight.detach().clone()
        (dense,) = torch.autograd.grad(model(x), [model.linear.weight])
        compiled(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        index = optimizer.state[model.linear.weight]["index"]
        moved = (model.linear.weight.detach() != before).any(1 - dim).nonzero().flatten()
        assert torch.equal(moved, index) or scores != "exact"  # which name those of the next step
        assert all(torch.equal(rows.view(-1, 4), rows.view(-1, 4)[:, :1] + torch.arange(4)) for rows in (moved, index))
        if kind == "top" and scores == "exact" and step % 2 == 0:
            norms = dense.movedim(dim, 0).reshape(-1, 4 * dense.shape[1 - dim]).norm(dim=1)
            assert (index.view(-1, 4)[:, 0] // 4).tolist() == norms.topk(2).indices.sort().values.tolist()
        seen.add(tuple(index.tolist()))
    assert kind == "top" or len(seen) > 1

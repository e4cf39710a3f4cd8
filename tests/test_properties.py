"""What must hold for every shape, rank and axis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grass_compile import ops
from grass_compile.math import selection
from grass_compile.math.refresh import settled
from grass_compile.passes.joint import costs

from .harness import pair

sizes = st.integers(2, 12)


@settings(max_examples=12, deadline=None)
@given(
    rows=sizes, columns=sizes, tokens=st.integers(2, 9), rank=st.integers(1, 12), axis=st.sampled_from(["rows", "columns"]),
    bias=st.booleans(), on_refresh=st.sampled_from(["reset", "carry"]),
)  # fmt: skip
def test_training_equals_oracle(rows: int, columns: int, tokens: int, rank: int, axis: str, bias: bool, on_refresh: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(rows * 100 + columns)
    model = nn.Linear(columns, rows, bias=bias).double()
    x = torch.randn(tokens, columns, dtype=torch.float64)
    run = pair(model, [x], rank=rank, axis=axis, on_refresh=on_refresh, update_proj_gap=2)
    assert len(run.oracle.projected) == (rank <= max(rows, columns))
    for _ in range(4):
        run.step(lambda y: (y - 1).square().sum(), x)
    assert run.difference() < 1e-10


@settings(max_examples=60, deadline=None)
@given(rows=sizes, columns=sizes, seed=st.integers(0, 1000), dim=st.integers(0, 1), data=st.data())
def test_top_rows_are_distinct_ascending_and_largest(rows: int, columns: int, seed: int, dim: int, data: st.DataObject) -> None:
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(1, gradient.shape[dim]))
    index = selection.top(selection.scores(gradient, dim), rank)
    norms = gradient.norm(dim=1 - dim)
    assert index.tolist() == sorted(set(index.tolist())) and len(index) == rank
    left_out = [i for i in range(gradient.shape[dim]) if i not in index.tolist()]
    assert not left_out or float(norms[index].min()) >= float(norms[left_out].max()) * (1 - 1e-6)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 20), dim=st.integers(0, 1), seed=st.integers(0, 1000), data=st.data())
def test_carrying_keeps_what_stays_and_zeroes_what_is_new(length: int, dim: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, length))
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.randperm(length, generator=generator)[:rank].sort().values for _ in range(2))
    moment = torch.randn((rank, 3) if dim == 0 else (3, rank), generator=generator)
    step, moved = settled("carry", "sf", length, dim, old, new, [torch.arange(1.0, rank + 1), moment])
    for position, row in enumerate(new.tolist()):
        kept = old.tolist().index(row) if row in old.tolist() else None
        expected = torch.zeros(3) if kept is None else moment.select(dim, kept)
        assert torch.equal(moved.select(dim, position), expected)
        assert float(step[position]) == (0.0 if kept is None else kept + 1)


@settings(max_examples=40, deadline=None)
@given(rows=sizes, columns=sizes, dim=st.integers(0, 1), bf16=st.booleans(), data=st.data())
def test_row_update_rounds_once(rows: int, columns: int, dim: int, bf16: bool, data: st.DataObject) -> None:
    weight = torch.randn(rows, columns).to(torch.bfloat16 if bf16 else torch.float32)
    rank = data.draw(st.integers(1, weight.shape[dim]))
    index = torch.randperm(weight.shape[dim])[:rank].sort().values
    shape = (rank, columns) if dim == 0 else (rows, rank)
    update = torch.randn(shape)
    expected = weight.clone()
    for position, row in enumerate(index.tolist()):
        exact = weight.select(dim, row).float() + update.select(dim, position)
        expected.select(dim, row).copy_(exact.to(weight.dtype))
    assert torch.equal(ops.row_update(weight, dim, index, update), expected)
    ops.row_update_(weight, dim, index, update)
    assert torch.equal(weight, expected)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9000), n=st.integers(1, 9000), b=st.integers(1, 10**6), r=st.integers(1, 512))
def test_cost_model_is_what_the_formulas_say(m: int, n: int, b: int, r: int) -> None:
    values = {costs.m: m, costs.n: n, costs.b: b, costs.r: r, costs.s: 4, costs.e: 2, costs.k: 3, costs.c: 1}
    rows = 2 * b * r * n / costs.FLOPS_PER_BYTE + 8 * r * n + 2 * b * n / 3
    columns = 2 * b * r * m / costs.FLOPS_PER_BYTE + 8 * r * m + 2 * b * r
    assert float(costs.total_bytes("rows").subs(values)) == pytest.approx(rows)
    assert float(costs.total_bytes("columns").subs(values)) == pytest.approx(columns)
    shared = float(costs.total_bytes("columns").subs({**values, costs.c: 3}))
    assert shared == pytest.approx(columns - 2 * b * r * 2 / 3)

"""The gather of a CPU, in C++, against indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from grass_compile import ops

pytestmark = pytest.mark.inductor  # it needs a C++ compiler, as Inductor does


@pytest.mark.parametrize("tokens", [1, 7, 700])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equals_indexing(dtype: torch.dtype, layout: str, tokens: int) -> None:
    """Large enough for several threads, and not; in any strides, from any offset."""
    torch.manual_seed(0)
    features = {
        "plain": torch.randn(tokens, 60),
        "transposed": torch.randn(60, tokens).t(),
        "sliced": torch.randn(tokens + 2, 80)[1:-1, 7:67],
        "strided": torch.randn(tokens, 120)[:, ::2],
    }[layout].to(dtype)
    index = torch.randperm(60)[:37]
    found = torch.ops.grass_compile.gather_on_cpu([features], [index])
    assert torch.equal(found, features[:, index]) and found.t().is_contiguous()
    assert torch.equal(found, ops.gather([features], [index]))
    assert found.stride() == ops.gather([features], [index]).stride() == _strides_when_traced(ops.gather, [features], [index])


def test_several_side_by_side() -> None:
    """Of different widths and strides, with other ranks."""
    torch.manual_seed(0)
    features = [torch.randn(50, 30), torch.randn(20, 50).t(), torch.randn(50, 64)[:, ::2]]
    index = [torch.randperm(source.shape[1])[:rank] for source, rank in zip(features, (7, 3, 12), strict=True)]
    found = torch.ops.grass_compile.gather_on_cpu(features, index)
    assert torch.equal(found, torch.cat([source[:, rows] for source, rows in zip(features, index, strict=True)], 1))
    assert torch.equal(found, ops.gather(features, index))
    assert found.stride() == ops.gather(features, index).stride() == _strides_when_traced(ops.gather, features, index)


@pytest.mark.parametrize("rows", [1, 7, 700])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_contiguous_copies_a_transposed_matrix(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(60, rows).to(dtype).t()
    found = torch.ops.grass_compile.contiguous_on_cpu(matrix)
    assert torch.equal(found, matrix) and found.is_contiguous() and found.data_ptr() != matrix.data_ptr()
    assert torch.equal(found, ops.contiguous(matrix))
    assert found.stride() == _strides_when_traced(ops.contiguous, matrix)


def _strides_when_traced(op: Any, *inputs: Any) -> tuple[int, ...]:
    with FakeTensorMode() as mode:
        return op(*tree_map(mode.from_tensor, inputs)).stride()  # type: ignore[no-any-return]


def test_no_tokens() -> None:
    assert torch.ops.grass_compile.gather_on_cpu([torch.randn(0, 9)], [torch.arange(4)]).shape == (0, 4)

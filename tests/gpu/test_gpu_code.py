"""What `benchmarks.gpu_code` counts, and that the kernels move no more than it says they should."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import gpu_code

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to generate code for a GPU")


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_sectors_are_those_of_random_columns(block: int, item: int) -> None:
    width, rank, each = 512, 64, gpu_code.SECTOR // item
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(400):
        blocks = torch.randperm(width // block, generator=generator)[: rank // block]
        columns = (blocks[:, None] * block + torch.arange(block)).flatten()
        counts.append(len((columns // each).unique()))
    expected = gpu_code._sectors(width, rank, block, item)
    assert sum(counts) / len(counts) == pytest.approx(expected, rel=0.02)


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("axis", "block", "gpu"),
    [("columns", 1, "H200"), ("columns", 16, "A100"), pytest.param("rows", 1, "H200", marks=pytest.mark.exhaustive)],
)
def test_a_step_moves_what_it_has_to(axis: str, block: int, gpu: str) -> None:
    """Nothing is as large as a weight: a decay that rounds away is left out. Whole sectors where columns are in blocks."""
    pytest.importorskip("transformers", reason="builds the model")
    width, rank = 512, 32
    kernels = gpu_code.counted(axis, width, 1024, 256, rank, block, "AdamW", gpu)
    step = [kernel for kernel in kernels if kernel.graph == "step"]
    assert len(step) == 7 * 4
    weight, compact = 2 * width * width, width * rank
    moments = [kernel for kernel in step if "sqrt" in kernel.name]
    least = compact * (2 + 2 * 2 + 4 * 4)  # the gradient; the weight, read and written; two moments in fp32
    assert len(moments) == 7 and min(kernel.least for kernel in moments) == pytest.approx(least, rel=0.02)
    assert all(kernel.least < 0.5 * weight for kernel in step if "sqrt" not in kernel.name)
    gathers = [kernel for kernel in kernels if "gather" in kernel.name]
    in_the_step = {kernel.moved > 1.15 * kernel.least for kernel in moments}
    assert in_the_step == {axis == "columns" and block == 1}
    assert {kernel.moved > 1.15 * kernel.least for kernel in gathers} == {block == 1}

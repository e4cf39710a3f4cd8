"""What every test starts from: a fixed seed and an empty Dynamo cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# On some CPUs MKL rounds a small product by where in memory its result lies. Tests that compare to the bit ask it not to; it
# reads this at its first product. (Its other answers, AVX2 among them, are not enough for float64.)
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import torch


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A fixed seed, and no compiled code of an earlier test."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

"""What every test starts from: a fixed seed and an empty Dynamo cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# On some CPUs MKL rounds a small product by where in memory its result lies. Tests that compare to the bit ask it not to; it
# reads this at its first product. (Its other answers, AVX2 among them, are not enough for float64.)
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import torch
from torch import fx

from grass_compile.passes import pipeline

# pytest reads every logger that does not propagate. torch takes a reader of this one for a wish to see every graph of every
# compilation as text, which costs a tenth of a test's time.
torch._logging._internal.trace_log.propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run cases that are much like others, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A fixed seed, and no compiled code of an earlier test."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def lint_after_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph that a pass leaves is well formed, and a pass that reports no change has made none to the operators."""
    after_pass = pipeline.after_pass

    def checked(name: str, gm: fx.GraphModule, changes: int, before: dict[str, int]) -> None:
        gm.graph.lint()
        assert isinstance(changes, int), name
        after_pass(name, gm, changes, before)

    monkeypatch.setattr(pipeline, "after_pass", checked)

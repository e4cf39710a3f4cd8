"""``torch.library.opcheck`` on every operator: schema, fake against real, and the dispatch that AOTAutograd relies on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grass_compile
from grass_compile import ops

OPS = torch.ops.grass_compile
MATRIX, INDEX = (7, 6), [4, 1, 5]
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


def state() -> list[torch.Tensor]:
    return [torch.zeros(3, 6), torch.zeros(3, 6), torch.zeros(())]


def index() -> torch.Tensor:
    return torch.tensor(INDEX)


CASES: dict[str, Any] = {
    "once": lambda: (torch.randn(MATRIX),),
    "contiguous": lambda: (torch.randn(MATRIX).t(),),
    "contiguous_on_cpu": lambda: (torch.randn(MATRIX).t(),),
    "gather": lambda: ([torch.randn(MATRIX)], [index()]),
    "gather_on_cpu": lambda: ([torch.randn(MATRIX), torch.randn(7, 9)], [index(), index()]),
    "row_update": lambda: (torch.randn(MATRIX), 0, index(), torch.randn(3, 6)),
    "row_update_": lambda: (torch.randn(MATRIX), 1, index(), torch.randn(7, 3)),
    "rank_update": lambda: (torch.randn(MATRIX), 0, torch.randn(7, 3), torch.randn(3, 6)),
    "rank_update_": lambda: (torch.randn(MATRIX), 1, torch.randn(6, 3), torch.randn(7, 3)),
    "sample": lambda: (torch.randn(MATRIX), 2),
    "energy": lambda: (torch.randn(MATRIX), torch.tensor(True)),
    "product_energy": lambda: (torch.randn(MATRIX), torch.randn(7, 5), 2, 2, []),
    "sketched_energy": lambda: (torch.randn(MATRIX), torch.randn(7, 5), torch.zeros(4), torch.tensor(True), []),
    "propose_": lambda: (torch.rand(6), None, index(), None, "top", []),
    "refresh_": lambda: (
        torch.randn(MATRIX), index(), None, [torch.zeros(3), torch.zeros(3, 6)], 0, 3, "reset", "top", "sf", True,
    ),
    "step_": lambda: (torch.randn(3, 6), torch.randn(MATRIX), torch.zeros(4), index(), state(), "opcheck"),
}  # fmt: skip
NEVER_RUN = ("anchor", "norm")


def test_every_operator_is_checked() -> None:
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("grass_compile::")}
    assert {name.split(".")[0] for name in defined} == {*CASES, *NEVER_RUN}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    ops.kernels["opcheck"] = lambda gradient, weight, hyper, selector, *state: weight.add_(1)
    torch.library.opcheck(getattr(OPS, name).default, CASES[name](), test_utils=UTILS)


@pytest.mark.parametrize("name", NEVER_RUN)
def test_what_only_stands_for_something_refuses_to_run(name: str) -> None:
    gradient, weight = torch.randn(3, 6), torch.randn(MATRIX)
    arguments = {"anchor": (gradient, weight, torch.zeros(4), [index()], None, [3, 6], 0), "norm": ([gradient], [weight])}
    with pytest.raises(grass_compile.StateError, match="No weight has moved"):
        getattr(OPS, name).default(*arguments[name])


def test_operators_that_ask_the_host_stay_out_of_cuda_graphs() -> None:
    """Those that branch on ``due``, and the refresh, which waits for the device."""
    for name in ("energy", "sketched_energy", "propose_", "refresh_"):
        assert torch.Tag.cudagraph_unsafe in getattr(OPS, name).default.tags, name

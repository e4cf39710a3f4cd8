"""Dead nodes go, and equal expressions are computed once; every output keeps its value."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from grass_compile.passes.context import PassContext
from grass_compile.passes.fx_utils import op_counts
from grass_compile.passes.joint.normalize import normalize


def test_equal_and_dead_expressions_go() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x.cos()
        return x.view(6) + 1, x.view(6) * 2

    x = torch.randn(2, 3)
    gm = make_fx(function)(x)
    assert normalize(gm, PassContext()) >= 2
    gm.recompile()
    assert op_counts(gm) == {"aten.view.default": 1, "aten.add.Tensor": 1, "aten.mul.Tensor": 1}
    for own, expected in zip(gm(x), function(x), strict=True):
        assert torch.equal(own, expected)


def test_graph_without_any_stays() -> None:
    gm = make_fx(lambda x: (x.sin(), x.cos()))(torch.randn(3))
    before = op_counts(gm)
    assert normalize(gm, PassContext()) == 0 and op_counts(gm) == before

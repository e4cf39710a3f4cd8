"""The expressions that the walk finds behind a gradient; `tests.test_forms` has their values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from grass_compile.passes.joint.reasons import Refused
from grass_compile.passes.joint.shapes import aligned
from grass_compile.passes.joint.walk import Frame, Walk
from grass_compile.passes.pipeline import find
from grass_compile.passes.records import Cast, Gradient, Padded, Product, Reordered, Scale, Sum, parts_of

from .. import forms
from ..harness import joint_graph

aten = torch.ops.aten


def expression(model: nn.Module, dtype: torch.dtype = torch.float32) -> Gradient:
    (site, *_), _ = joint_graph(model.to(dtype), forms.batch(dtype)).find()
    return site.gradient


def kinds(gradient: Gradient) -> list[type]:
    """The kinds of expressions from the outermost inwards, of the first part of each."""
    return [type(gradient), *(kinds(parts_of(gradient)[0]) if parts_of(gradient) else [])]


def walked(function: object, *tensors: Tensor, shape: tuple[int, int] = (4, 6)) -> Gradient:
    """What is found in a graph whose only output is a gradient of this shape."""
    gm = make_fx(function)(*tensors)  # type: ignore[arg-type]
    (slot,) = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes
    for node in gm.graph.nodes:
        node.meta["val"] = node.meta.get("val", node.meta.get("tensor_meta"))
    return Walk(set()).parse(slot, Frame(((0,), (1,)), (0, 0), shape))


@pytest.mark.parametrize(
    ("column", "row"), [((4, 1), (1, 6)), ((4, 1), (6,)), ((1, 6), (4, 1))], ids=["matrices", "vector", "turned"]
)
def test_outer_product_is_a_product_over_one_token(column: tuple[int, ...], row: tuple[int, ...]) -> None:
    product = walked(lambda a, b: a * b, torch.randn(column), torch.randn(row))
    assert isinstance(product, Product)
    assert [product.left.length, product.right.length] == [4, 6]
    assert product.left.node.meta["val"].numel() == 4 and product.right.node.meta["val"].numel() == 6


def test_elementwise_product_of_matrices_is_none() -> None:
    with pytest.raises(Refused, match="an input of the graph or a constant"):
        walked(lambda a, b: a * b, torch.randn(4, 6), torch.randn(4, 6))


def test_sum_over_tokens_of_columns_times_rows() -> None:
    product = walked(lambda a, b: (a * b).sum([0]), torch.randn(3, 4, 1), torch.randn(3, 1, 6))
    assert isinstance(product, Product)
    assert [len(product.left.dims), len(product.right.dims)] == [3, 3]


def test_weighted_sum_is_refused() -> None:
    with pytest.raises(Refused, match="weighted sum"):
        walked(lambda a, b: torch.add(a @ b, a @ b, alpha=2), torch.randn(4, 3), torch.randn(3, 6))


@pytest.mark.parametrize("name", ["OneRow", "OneVector"])
def test_one_token(name: str) -> None:
    assert kinds(expression(forms.FORMS[name]()))[-1] is Product
    assert kinds(expression(forms.FORMS["OneRow"](), torch.bfloat16)) == [Cast, Product]


def test_scales() -> None:
    both = expression(forms.Scaled())
    assert isinstance(both, Sum)
    assert {term.target for term in both.terms if isinstance(term, Scale)} <= {aten.mul.Tensor, aten.neg.default, aten.div.Tensor}
    outer = expression(forms.ScaledRows())
    assert kinds(outer) == [Scale, Scale, Product]
    factors = [outer.factor.dims, outer.inner.factor.dims]  # type: ignore[union-attr]
    assert sorted(dims.index(None) for dims in factors) == [0, 1]  # one for each row, one for each column
    masked = expression(forms.Masked())
    assert isinstance(masked, Scale) and masked.factor.dims == (0, 1)


def test_factor_of_joined_weights_is_cut_like_their_gradients() -> None:
    joined, _ = joint_graph(forms.ScaledJoined(), forms.batch(torch.float32)).find()
    factors = [site.gradient.factor for site in joined]  # type: ignore[union-attr]
    assert [(factor.starts[0], factor.lengths[0]) for factor in factors] == [(0, 16), (16, 8), (24, 8)]


def test_slices_are_padded() -> None:
    strided = expression(forms.Strided())
    assert isinstance(strided, Sum)
    found = [term for term in strided.terms if isinstance(term, Padded)]
    assert sorted((part.dim, part.start, part.step, part.size) for part in found) == [(0, 0, 2, 32), (0, 1, 2, 32)]
    columns = expression(forms.StridedColumns())
    assert [part.dim for part in parts_of(columns) if isinstance(part, Padded)] == [1, 1]


def test_heads_innermost_are_reordered() -> None:
    gradient = expression(forms.HeadsInnermost())
    assert isinstance(gradient, Reordered) and (gradient.dim, gradient.sizes, gradient.order) == (0, (4, 8), (1, 0))
    inwards = expression(forms.HeadsInnermostIn())
    assert isinstance(inwards, Reordered) and inwards.dim == 1


def test_projection_of_scaled_rows_is_refused_along_them() -> None:
    """``Pᵀ (c ∘ G)`` is no product of ``Pᵀ dYᵀ`` and ``X``."""
    joint = joint_graph(forms.Masked(), forms.batch(torch.float32))
    (weight,) = joint.weights()
    asked = dataclasses.replace(weight, config=dataclasses.replace(weight.config, projection="gaussian"))
    _, analysis = find(joint.gm, weights=[asked], num_fwd_outputs=joint.num_fwd_outputs)
    assert "scaled by a tensor, which projection='gaussian' would have to project too" in analysis.refusals[0].reason


class Nested(nn.Module):
    """A slice of a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = forms.weight()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x[..., :8], self.w[4:20][:, 8:16])


def test_slice_of_a_slice() -> None:
    gradient = expression(Nested())
    assert kinds(gradient) == [Padded, Padded, Product]


def test_blocks_of_a_reshape() -> None:
    assert aligned((4, 6), (2, 2, 6)) == [((0,), (0, 1)), ((1,), (2,))]

"""Detection: what is found, what is refused and in which words, and that analysis leaves the graph alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grass_compile.passes.context import PassContext
from grass_compile.passes.joint.detect import detect
from grass_compile.passes.joint.reasons import Refused
from grass_compile.passes.joint.shapes import aligned
from grass_compile.passes.records import Concat, Product, Sum

from .. import forms
from ..harness import joint_graph


class Tied(nn.Module):
    """An embedding table that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 24))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, self.w).tanh(), self.w)


class Pieces(nn.Module):
    """Things that cannot be projected, each for its own reason."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = {"conv": (8, 24, 1), "small": (3, 2), "vector": (24,), "experts": (3, 24, 8)}.get(kind, (24, 24))
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return F.conv1d(x.transpose(1, 2), self.w)
        if self.kind == "small":
            return x[..., :2] @ self.w.t()
        if self.kind == "vector":
            return x * self.w
        if self.kind == "experts":
            return torch.bmm(x, self.w)
        if self.kind == "where":
            return F.linear(x, torch.where(self.w > 0, self.w, 0.0))
        if self.kind == "power":
            return F.linear(x, self.w * self.w)
        if self.kind == "cond":
            return torch.cond(x.sum() > 0, lambda x: F.linear(x, self.w), lambda x: F.linear(x, 2 * self.w), (x,))
        if self.kind == "elementwise":
            return F.linear(x, self.w) + self.w[0]
        if self.kind == "embedding":
            return F.embedding((x[..., 0] > 0).long(), self.w)
        raise AssertionError(self.kind)


REASONS = {
    "conv": "it has 3 dimensions; only matrices of fixed size can be projected",
    "small": "it is smaller than the rank: 3x2 against rank 4",
    "vector": "it has 1 dimensions; only matrices of fixed size can be projected",
    "experts": "it has 3 dimensions; only matrices of fixed size can be projected",
    "where": "its gradient is computed by aten.where.self, not by a matrix product",
    "cond": "it is used inside torch.cond, whose own graph is not rewritten",
    "embedding": "it is an embedding table: its gradient is a scatter over tokens, not a matrix product",
}


@pytest.mark.parametrize("kind", REASONS)
def test_refusal_says_why(kind: str) -> None:
    sites, analysis = joint_graph(Pieces(kind), forms.batch(torch.float32)).find()
    assert not sites
    assert [refusal.reason for refusal in analysis.refusals] == [REASONS[kind]]


def test_tied_embedding_is_refused() -> None:
    sites, analysis = joint_graph(Tied(), torch.randint(0, 32, (2, 5))).find()
    assert not sites
    assert "tied weights" in analysis.refusals[0].reason


def test_reason_known_beforehand_is_kept() -> None:
    sites, analysis = joint_graph(forms.Linear(), forms.batch(torch.float32)).find(w="it has a tensor hook")
    assert not sites and analysis.refusals[0].reason == "it has a tensor hook"


def test_gradient_used_elsewhere_is_formed_and_its_rows_are_taken_from_it() -> None:
    joint = joint_graph(forms.Linear(), forms.batch(torch.float32))
    output = next(iter(joint.gm.graph.find_nodes(op="output")))
    loss, grad, *_ = output.args[0]
    with joint.gm.graph.inserting_before(output):
        norm = joint.gm.graph.call_function(torch.ops.aten.sum.default, (grad,))
        norm.meta["val"] = torch.ops.aten.sum.default(grad.meta["val"])
    output.args = ((loss, grad, norm),)
    (site,), _ = joint.find()
    assert site.needed == "node sum_default (aten.sum.default)"
    assert "its full gradient is formed anyway, for node sum_default" in site.choice.why


def test_analysis_changes_nothing() -> None:
    joint = joint_graph(forms.Linear(), forms.batch(torch.float32))
    before, graph = str(joint.gm.graph), joint.gm.graph
    context = PassContext(joint.weights(), joint.num_fwd_outputs)
    assert detect(joint.gm, context) == 0 and len(context.findings.sites) == 1
    assert joint.gm.graph is graph and str(joint.gm.graph) == before


@pytest.mark.parametrize(
    ("name", "out_dim"), [("Linear", 0), ("InOut", 1), ("Bmm", 1), ("Einsum", 0), ("EinsumHeads", 0), ("FusedQKV", 0)]
)
def test_out_features_are_told_from_the_backward(name: str, out_dim: int) -> None:
    (site,), _ = joint_graph(forms.FORMS[name](), forms.batch(torch.float32)).find(axis="rows")
    assert site.out_dim == out_dim and site.dim == out_dim
    (site,), _ = joint_graph(forms.FORMS[name](), forms.batch(torch.float32)).find(axis="columns")
    assert site.dim == 1 - out_dim


def test_expressions_of_compound_gradients() -> None:
    (twice,), _ = joint_graph(forms.Twice(), forms.batch(torch.float32)).find()
    assert isinstance(twice.gradient, Sum) and len(twice.products) == 2
    (split,), _ = joint_graph(forms.SplitWeight(), forms.batch(torch.float32)).find()
    assert isinstance(split.gradient, Concat) and split.gradient.dim == 0
    joined, _ = joint_graph(forms.JoinedWeights(), forms.batch(torch.float32)).find()
    parts = [site.gradient for site in joined]
    assert all(isinstance(part, Product) for part in parts)
    assert [(part.left.start, part.left.length) for part in parts] == [(0, 16), (16, 8), (24, 8)]  # type: ignore[union-attr]
    assert len({part.matmul for part in parts}) == 1  # type: ignore[union-attr]


def test_joined_weight_that_stays_dense_needs_the_product_of_all() -> None:
    joint = joint_graph(forms.JoinedWeights(), forms.batch(torch.float32))
    sites, analysis = joint.find(k="its name matches exclude='k'")
    assert [site.weight.name for site in sites] == ["q", "v"] and all(site.needed for site in sites)
    assert [refusal.reason for refusal in analysis.refusals] == ["its name matches exclude='k'"]


def test_slot_shared_with_a_dense_parameter_is_needed() -> None:
    """Both are added before use, so that one node is the gradient of both."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = forms.weight(), forms.weight()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.one + self.other)

    joint = joint_graph(Added(), forms.batch(torch.float32))
    assert [site.needed for site in joint.find()[0]] == [None, None]
    (site,), _ = joint.find(other="it has a tensor hook")
    assert site.needed == "an output of the graph"


def test_factor_of_another_weight_needs_the_full_gradient() -> None:
    """Of ``W + B A``: what trains B and A reads the gradient of W."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b, self.a = forms.weight(), forms.weight(forms.M, 4), forms.weight(4, forms.N)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w + 0.5 * (self.b @ self.a))

    sites, _ = joint_graph(LowRank(), forms.batch(torch.float32)).find()
    assert {site.weight.name: site.needed is not None for site in sites} == {"w": True, "b": False, "a": False}


class SplitOverTwoInputs(forms.SplitWeight):
    """Parts of one weight that read different activations."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.w.split(16)
        return torch.cat([F.linear(x, q), F.linear(x.flip(0), k), F.linear(x.tanh(), v)], -1)


def test_split_over_different_activations_only_along_columns() -> None:
    joint = joint_graph(SplitOverTwoInputs(), forms.batch(torch.float32))
    sites, analysis = joint.find(axis="rows")
    assert not sites and "axis='rows' is not possible" in analysis.refusals[0].reason
    assert joint.find(axis="columns")[0] and joint.find(axis="auto")[0][0].choice.axis == "columns"


def test_dynamic_batch_is_found_without_a_guard() -> None:
    joint = joint_graph(forms.Linear(), forms.batch(torch.float32), dynamic=True)
    primal = next(iter(joint.gm.graph.find_nodes(op="placeholder")))
    environment = primal.meta["val"].fake_mode.shape_env
    before = len(environment.guards)
    (site,), _ = joint.find(axis="auto")
    assert len(environment.guards) == before
    assert not isinstance(site.products[0].left.node.meta["val"].shape[0], int)


@pytest.mark.parametrize(
    ("new", "old", "blocks"),
    [
        ((6, 4), (2, 3, 4), [((0,), (0, 1)), ((1,), (2,))]),
        ((2, 3, 1, 4), (6, 4), [((0, 1), (0,)), ((3,), (1,))]),
        ((24,), (24,), [((0,), (0,))]),
        ((1, 6), (6, 1), [((1,), (0,))]),
    ],
)
def test_aligned_blocks(new: tuple[int, ...], old: tuple[int, ...], blocks: list[object]) -> None:
    assert aligned(new, old) == blocks


def test_shapes_that_mix_rows_and_columns_are_one_block_or_refused() -> None:
    assert aligned((4, 6), (6, 4)) == [((0, 1), (0, 1))]
    with pytest.raises(Refused):
        aligned((4,), (6,))

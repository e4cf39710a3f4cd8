"""The rewritten graphs: what is computed, what is saved for the backward, and what is written where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import grass_compile
from grass_compile import _torch, ops
from grass_compile.config import SiteConfig
from grass_compile.errors import GraphError
from grass_compile.math.layout import SHARED_HYPER
from grass_compile.optim.rules import AdamWRule
from grass_compile.passes import pipeline
from grass_compile.passes.backward.schedule_steps import steps, written
from grass_compile.passes.backward.verify import verify
from grass_compile.passes.fx_utils import PROVENANCE, op_counts, outputs
from grass_compile.passes.kernel import step_graph

from .. import forms, paper
from ..harness import products

aten = torch.ops.aten


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, fx.GraphModule]]:
    """The forward and the backward of each pair that runs, finished, in order: refresh, regular."""
    made: list[tuple[fx.GraphModule, fx.GraphModule]] = []
    traced: set[pipeline.Plan] = set()
    forwards: dict[Any, fx.GraphModule] = {}
    transform, finish_forward, finish_backward = pipeline.transform, pipeline.finish_forward, pipeline.finish_backward

    def watched_transform(*args: Any, plan: pipeline.Plan, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert plan not in traced, "partitioned twice"
        traced.add(plan)
        return transform(*args, plan=plan, **kwargs)

    def watched_forward(gm: fx.GraphModule, plan: pipeline.Plan, refresh: Any) -> fx.GraphModule:
        before = op_counts(gm)
        forwards[plan, refresh] = finish_forward(gm, plan, refresh)
        assert op_counts(gm) == before, "the forward serves other steps too and must stay as it is"
        return forwards[plan, refresh]

    def watched_backward(gm: fx.GraphModule, plan: pipeline.Plan, key: Any, saved: Any) -> fx.GraphModule:
        before = op_counts(gm)
        made.append((forwards[plan, key[0]], finish_backward(gm, plan, key, saved)))
        assert op_counts(gm) == before, "the graph with anchors serves other actions too and must stay as it is"
        return made[-1][1]

    monkeypatch.setattr(pipeline, "transform", watched_transform)
    monkeypatch.setattr(pipeline, "finish_forward", watched_forward)
    monkeypatch.setattr(pipeline, "finish_backward", watched_backward)
    return made


def train(model: nn.Module, steps: int = 2, options: dict[str, Any] | None = None, **keywords: Any) -> grass_compile.AdamW:
    """A few steps through the compiled path, op by op."""
    optimizer = paper.AdamW(model.named_parameters(), **{"rank": forms.RANK, **keywords})
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", **(options or {})})
    for step in range(steps):
        forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "InOut", "Bmm", "FusedQKV", "SplitWeight", "Twice"])
def test_no_full_product_where_scores_are_sampled(name: str, axis: str, graphs: list[Any]) -> None:
    """Neither on a refresh nor on a regular step; and a regular step saves nothing for the scores."""
    model = forms.FORMS[name]()
    train(model, axis=axis, scores="sampled")
    train(forms.FORMS[name](), axis=axis)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    choosing, regular, _, plain = graphs
    assert products(choosing[1], shape) == products(regular[1], shape) == 0
    assert "grass_compile.propose_.default" in op_counts(choosing[1])
    assert not any("energy" in name or "sample" in name or "propose" in name for gm in regular for name in op_counts(gm))
    assert _saved_bytes(regular[0]) == _saved_bytes(plain[0]) + 8 * forms.RANK  # where the next rows are put: no activation


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "InOut", "Bmm", "FusedQKV", "SplitWeight", "Twice"])
def test_one_graph_where_scores_are_estimated(name: str, axis: str, graphs: list[Any]) -> None:
    """A refresh is no other graph than a regular step, without a full product, and keeps no activation for the scores."""
    model = forms.FORMS[name]()
    train(model, steps=4, axis=axis, scores="estimate", update_proj_gap=3)
    train(forms.FORMS[name](), axis=axis)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    both, _, plain = graphs
    assert products(both[1], shape) == 0
    assert "grass_compile.propose_.default" in op_counts(both[1])
    energies = op_counts(both[0]).get("grass_compile.energy.default", 0)
    assert (energies > 0) == (axis == "columns")
    extra = _saved_bytes(both[0]) - _saved_bytes(plain[0]) - 8 * forms.RANK - 1  # where the next rows are put, and whether
    assert extra == 0 if axis == "rows" else 0 < extra <= 4 * energies * max(shape)


def _saved_bytes(forward: fx.GraphModule) -> int:
    values = [node.meta["val"] for node in outputs(forward) if isinstance(node, fx.Node)]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["Linear", "LinearBias", "InOut", "Bmm", "EinsumHeads", "SplitWeight", "Twice"])
def test_no_full_product_on_a_regular_step(name: str, axis: str, graphs: list[Any]) -> None:
    model = forms.FORMS[name]()
    train(model, axis=axis)
    shape = tuple(next(p for p in model.parameters() if p.dim() == 2).shape)
    (_, refresh), (_, regular) = graphs
    assert products(refresh, shape) >= 1 or name == "SplitWeight"
    assert products(regular, shape) == 0
    part = 16 if name == "SplitWeight" else shape[0]  # along columns, each part has a product of its own
    assert products(regular, (forms.RANK, shape[1])) + products(regular, (part, forms.RANK)) >= 1


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_gather_is_tokens_by_rank(axis: str, graphs: list[Any]) -> None:
    train(forms.Linear(), axis=axis)
    forward, backward = graphs[1]
    gathers = [n for gm in (forward, backward) for n in gm.graph.nodes if n.target is ops.gather]
    assert [tuple(node.meta["val"].shape) for node in gathers] == [(forms.B * forms.S, forms.RANK)]


def test_columns_save_only_the_gathered_activation(graphs: list[Any]) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 48, bias=False), nn.Linear(48, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).cos_())

    saved = {}
    for axis in ("rows", "columns"):
        graphs.clear()
        torch._dynamo.reset()
        train(Deep(), axis=axis, rank=4)
        forward, _ = graphs[1]
        shapes = [tuple(v.meta["val"].shape) for v in outputs(forward)[1:] if isinstance(v, fx.Node)]
        saved[axis] = [shape for shape in shapes if forms.B * forms.S in shape or len(shape) == 3]
    tokens = forms.B * forms.S
    assert (4, tokens) in saved["columns"] and (tokens, 24) not in saved["columns"]  # it is saved as the view that is read
    size = {axis: sum(torch.Size(shape).numel() for shape in shapes) for axis, shapes in saved.items()}
    assert size["columns"] < size["rows"]


def test_writes_come_after_every_reader(graphs: list[Any]) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    train(Chain(), axis="rows", weight_decay=0.1)
    for _, backward in graphs:
        nodes = list(backward.graph.nodes)
        (reader,) = [n for n in nodes if n.target is aten.mm.default and tuple(n.meta["val"].shape) == (15, 24)]
        first, second = steps(backward)
        assert {node.args[1].name for node in (first, second)} == {"primals_1", "primals_4"}
        assert first.args[1].name == "primals_4", "the last layer's gradient is known first"
        assert nodes.index(reader) < nodes.index(first) < nodes.index(second)
        assert nodes.index(first) < min(nodes.index(n) for n in second.all_input_nodes if n.op != "placeholder")
        verify(backward, names=["a.weight", "b.weight"])


def test_slots_of_projected_weights_return_none(graphs: list[Any]) -> None:
    train(forms.LinearBias(), axis="rows")
    _, backward = graphs[1]
    assert [value is None for value in outputs(backward)][:2] == [True, False]


def test_every_new_node_says_where_it_comes_from(graphs: list[Any]) -> None:
    train(forms.Linear(), axis="rows")
    _, backward = graphs[1]
    seen = set()
    for node in backward.graph.nodes:
        if node.target in (ops.step_, ops.gather):
            seen.add(node.target)
            assert node.meta[PROVENANCE][1] == "w" and node.meta[PROVENANCE][0] in pipeline.PASSES
            assert "forms.py" in node.meta["stack_trace"]
            assert "val" in node.meta
    assert len(seen) == 2


def test_without_rewrite_the_rows_come_from_the_full_gradient(graphs: list[Any]) -> None:
    torch.manual_seed(0)
    with_pass, without = forms.Linear(), forms.Linear()
    without.load_state_dict(with_pass.state_dict())
    train(with_pass, axis="rows", steps=4)
    graphs.clear()
    torch._dynamo.reset()
    train(without, axis="rows", steps=4, options={"disable_passes": ["rewrite"]})
    assert products(graphs[1][1], (forms.M, forms.N)) == 1
    torch.testing.assert_close(with_pass.w, without.w)


@pytest.mark.parametrize("name", ["detect", "anchor", "lower_anchors", "schedule_steps"])
def test_without_an_essential_pass_everything_is_dense(name: str, graphs: list[Any]) -> None:
    optimizer = train(forms.Linear(), options={"disable_passes": [name]})
    assert not graphs
    assert "index" not in next(iter(optimizer.state.values()))


def test_model_without_projected_weights_is_compiled_as_it_is(graphs: list[Any]) -> None:
    train(forms.Linear(), rank=None)
    assert not graphs


def test_verify_sees_a_read_after_the_write(graphs: list[Any]) -> None:
    """Of the weight, be it through a view, and of the moments."""
    train(forms.Linear(), axis="rows")
    _, backward = graphs[1]
    (step,) = steps(backward)
    verify(backward, names=["w"])
    for node in written(step):
        with backward.graph.inserting_before(next(iter(backward.graph.find_nodes(op="output")))):
            view = backward.graph.call_function(aten.permute.default, (node, [1, 0]))
            reader = backward.graph.call_function(aten.sum.default, (view,))
        with pytest.raises(GraphError, match=rf"w: (permute|sum).* uses {node.name} after its step has written it"):
            verify(backward, names=["w"])
        backward.graph.erase_node(reader)
        backward.graph.erase_node(view)


def test_verify_wants_exactly_one_step(graphs: list[Any]) -> None:
    train(forms.Linear(), axis="rows")
    _, backward = graphs[1]
    (step,) = steps(backward)
    with backward.graph.inserting_after(step):
        backward.graph.node_copy(step)
    with pytest.raises(GraphError, match="w: 2 steps in one backward graph"):
        verify(backward, names=["w"])
    for node in steps(backward):
        backward.graph.erase_node(node)
    with pytest.raises(GraphError, match="w: 0 steps in one backward graph"):
        verify(backward, names=["w"])


def test_verify_sees_a_read_before_the_refresh(graphs: list[Any]) -> None:
    """Of the index and of the moments, which a refresh writes."""
    train(forms.Linear(), axis="rows")
    backward, _ = (backward for _, backward in graphs)
    (refresh,) = backward.graph.find_nodes(op="call_function", target=ops.refresh_)
    verify(backward, names=["w"])
    for node in refresh.all_input_nodes[1:]:
        with backward.graph.inserting_before(refresh):
            early = backward.graph.call_function(aten.neg.default, (node,))
        with pytest.raises(GraphError, match=f"{node.name}: {early.name} reads it before the refresh has written it"):
            verify(backward, names=["w"])
        backward.graph.erase_node(early)


def test_verify_sees_an_anchor_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished: list[fx.GraphModule] = []
    finish = pipeline.finish_backward

    def watched(gm: fx.GraphModule, *how: Any) -> fx.GraphModule:
        unfinished.append(gm)
        return finish(gm, *how)

    monkeypatch.setattr(pipeline, "finish_backward", watched)
    train(forms.Linear(), axis="rows")
    for gm in unfinished:
        assert op_counts(gm)["grass_compile.anchor.default"] == 1
        with pytest.raises(GraphError, match="an anchor is left"):
            verify(gm, names=[])


def test_partitioner_key_covers_the_plan() -> None:
    one, other = _torch.Partitioner(lambda *a, **k: None, "x"), _torch.Partitioner(lambda *a, **k: None, "y")  # type: ignore[arg-type, return-value]
    assert one.uuid() != other.uuid() and one.__getstate__() == {"function": None, "key": "x"}


def test_op_counts(graphs: list[Any]) -> None:
    train(forms.Linear(), axis="rows")
    refresh, regular = (op_counts(backward) for _, backward in graphs)
    for counts in (refresh, regular):
        assert counts["grass_compile.step_.default"] == 1 and "grass_compile.anchor.default" not in counts
        assert not {"aten.sqrt.default", "aten.copy_.default"} & set(counts), "the rule is compiled by itself"
    assert refresh["grass_compile.refresh_.default"] == 1 and "grass_compile.gather.default" not in refresh
    assert regular["grass_compile.gather.default"] == 1 and "grass_compile.refresh_.default" not in regular


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_step_by_itself_writes_in_place(dim: int, weight_decay: float) -> None:
    """The weight first, then the state; nothing functional is left, and nothing of the weight's size but with decay."""
    config = SiteConfig(4, "rows", "reset", weight_decay != 0.0, 1.0, AdamWRule())
    compact, state = torch.zeros((4, 8) if dim == 0 else (6, 4)), torch.zeros((4, 8) if dim == 0 else (6, 4))
    hyper = torch.zeros(len(AdamWRule().hyper_names) + len(SHARED_HYPER))
    tensors = (compact, torch.zeros(6, 8), hyper, torch.arange(4), torch.zeros(1), state, state)
    gm = step_graph(config, dim, tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors))
    counts = op_counts(gm)
    assert counts["grass_compile.row_update_.default"] == 1 and "grass_compile.row_update.default" not in counts
    assert counts["aten.copy_.default"] == 3 + (weight_decay != 0.0)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    whole = [node for node in calls if getattr(node.meta["val"], "shape", None) == (6, 8)]
    assert len(whole) == (2 if weight_decay else 0)  # the decayed weight, and its copy_
    update = next(i for i, node in enumerate(calls) if node.target is ops.row_update_)
    assert update < min(i for i, node in enumerate(calls) if node.target is aten.copy_.default and node.args[0].name != "input_1")


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_deferred_backward_returns_the_compact_gradient(axis: str, accumulate: int, graphs: list[Any]) -> None:
    """Of a refresh, the first backward chooses rows, which writes index and moments; every other writes nothing at all."""
    optimizer = paper.AdamW((model := forms.Linear()).named_parameters(), rank=4, axis=axis, step_in_backward=False)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for step in range(2):
        for _ in range(accumulate):
            forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    kinds = ["choose", "keep of a refresh", "keep"] if accumulate > 1 else ["choose", "keep"]
    assert len(graphs) == len(kinds)
    shape = (4, forms.N) if axis == "rows" else (forms.M, 4)
    for kind, (forward, backward) in zip(kinds, graphs, strict=True):
        counts = op_counts(backward)
        assert counts.get("grass_compile.refresh_.default", 0) == (kind == "choose")
        gathers = counts.get("grass_compile.gather.default", 0) + op_counts(forward).get("grass_compile.gather.default", 0)
        assert gathers == (kind == "keep") and products(backward, (forms.M, forms.N)) == (kind != "keep")
        assert "grass_compile.step_.default" not in counts
        compact = [value for value in outputs(backward) if isinstance(value, fx.Node)]
        assert [tuple(value.meta["val"].shape) for value in compact] == [shape]

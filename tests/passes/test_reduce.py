"""Collectives in a backward graph: one for a bucket of compact gradients."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.nn.parallel import DistributedDataParallel

from grass_compile.passes.backward import reduce
from grass_compile.passes.fx_utils import PROVENANCE

from .. import forms, paper

c10d = torch.ops._c10d_functional


class Through(nn.Module):
    """Runs a model. (Dynamo skips the forward of torch's own containers inside DDP's.)"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


COLLECTIVES = (c10d.all_reduce.default, c10d.reduce_scatter_tensor.default, c10d.all_gather_into_tensor.default)


def sent(backward: fx.GraphModule) -> list[tuple[int, ...]]:
    """The shapes that a backward gets from collectives; each is waited for."""
    nodes = [node for node in backward.graph.nodes if node.target in COLLECTIVES]
    assert [user.target for node in nodes for user in node.users] == [c10d.wait_tensor.default] * len(nodes)
    return [tuple(node.meta["val"].shape) for node in nodes]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("selection", ["top", "uniform"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_what_is_sent(axis: str, selection: str, graphs: list[Any]) -> None:
    """Compact gradients; where a refresh chooses by the full one, parts of that, scores, and parts of what was chosen."""
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis=axis, selection=selection, step_in_backward=True)
    compiled = torch.compile(DistributedDataParallel(model), backend="grass", options={"compiler": "aot_eager"})
    for step in range(2):
        forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores, others = (forms.M, forms.N) if axis == "rows" else (forms.N, forms.M)
    refresh = [[(1, forms.M * forms.N), (scores,), (others, 4)]] if selection == "top" else []
    assert [sent(backward) for _, backward in graphs] == [*refresh, [(4 * others,)]]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("selection", ["top", "uniform"])
def test_what_is_sent_under_no_sync(selection: str, graphs: list[Any]) -> None:
    """Nothing but what a refresh chooses by: all ranks have to choose the same."""
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis="rows", selection=selection)
    wrapped = DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend="grass", options={"compiler": "aot_eager"})
    for step in range(2):
        for last in (False, True):
            with contextlib.nullcontext() if last else wrapped.no_sync():
                forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    chosen = [shapes for _, backward in graphs if (shapes := sent(backward))]
    assert chosen == ([[(1, forms.M * forms.N), (forms.M,), (forms.N, 4)]] if selection == "top" else [])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("limit", "sizes"), [(reduce.BUCKET_BYTES, [3]), (4 * 4 * 50, [2, 1]), (1, [1, 1, 1])])
def test_gradients_travel_by_the_bucket(limit: int, sizes: list[int], graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as large as the limit allows, and what comes out of them is what went in: there is one rank."""
    monkeypatch.setattr(reduce, "BUCKET_BYTES", limit)
    weights = []
    for wrap in (DistributedDataParallel, lambda model: model):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)))
        optimizer = paper.AdamW(model.named_parameters(), rank=4, axis="columns", selection="uniform", step_in_backward=True)
        torch._dynamo.reset()
        compiled = torch.compile(wrap(Through(model)), backend="grass", options={"compiler": "aot_eager"})
        compiled(torch.ones(5, 24)).square().sum().backward()
        optimizer.step()
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert [shape for _, backward in graphs for shape in sent(backward)] == [(24 * 4 * size,) for size in sizes]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.usefixtures("alone")
def test_a_bucket_travels_while_the_next_is_computed(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the start of each but the last and its wait, the gradient of the next weight is computed."""
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 1)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(4)))
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis="columns", selection="uniform", step_in_backward=True)
    compiled = torch.compile(DistributedDataParallel(Through(model)), backend="grass", options={"compiler": "aot_eager"})
    compiled(torch.ones(5, 24)).square().sum().backward()
    optimizer.step()
    ((_, backward),) = graphs
    place = {node: number for number, node in enumerate(backward.graph.nodes)}
    starts = [node for node in backward.graph.nodes if reduce.STARTS_BUCKET in node.meta]
    assert len(starts) == 4
    for start, following in itertools.pairwise(starts):
        (wait,) = start.users
        between = [node for node in backward.graph.nodes if place[start] < place[node] < place[wait]]
        assert following in between and any(node.target is torch.ops.aten.mm.default for node in between)
    others = [node for node in backward.graph.nodes if node.op == "call_function" and PROVENANCE not in node.meta]
    (wait,) = starts[-1].users
    assert place[wait] > place[others[-1]]


@pytest.mark.usefixtures("alone")
def test_what_one_bucket_would_hold_travels_in_four(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that three of them travel while a block that is compiled by itself is computed; small ones stay together."""
    monkeypatch.setattr(reduce, "SPLIT_BYTES", 24 * 4 * 4)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(8)))
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis="columns", selection="uniform", step_in_backward=True)
    compiled = torch.compile(DistributedDataParallel(Through(model)), backend="grass", options={"compiler": "aot_eager"})
    compiled(torch.ones(5, 24)).square().sum().backward()
    optimizer.step()
    assert [shape for _, backward in graphs for shape in sent(backward)] == [(24 * 4 * 2,)] * 4


@pytest.mark.usefixtures("alone")
def test_the_generated_code_computes_while_a_bucket_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own order of kernels leaves a product between each start but the last and its wait."""
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 1)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(4)))
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis="columns", selection="uniform", step_in_backward=True)
    compiled = torch.compile(DistributedDataParallel(Through(model)), backend="grass")

    def train() -> None:
        compiled(torch.ones(5, 24)).square().sum().backward()
        optimizer.step()

    _, codes = run_and_get_code(train)
    (code,) = (code for code in codes if "all_reduce_" in code)
    calls = re.findall(r"(all_reduce_|wait_tensor)\.default\((\w+)|extern_kernels\.(mm)\(", code)
    starts = {buffer: place for place, (call, buffer, _) in enumerate(calls) if call == "all_reduce_"}
    waits = {buffer: place for place, (call, buffer, _) in enumerate(calls) if call == "wait_tensor"}
    assert len(starts) == 4 and set(starts) == set(waits)
    for buffer in list(starts)[:-1]:
        assert "mm" in [product for _, _, product in calls[starts[buffer] : waits[buffer]]]


def test_one_process_sends_nothing(graphs: list[Any]) -> None:
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    forms.loss_of(compiled(forms.batch(torch.float32))).backward()
    optimizer.step()
    assert graphs and all(sent(backward) == [] for _, backward in graphs)

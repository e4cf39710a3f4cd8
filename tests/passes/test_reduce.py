"""Collectives in a backward graph: one for each projected weight, on the compact gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn.parallel import DistributedDataParallel

from .. import forms, paper

c10d = torch.ops._c10d_functional


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sent(backward: fx.GraphModule) -> list[tuple[int, ...]]:
    """The shapes that a backward sends; each is waited for."""
    nodes = list(backward.graph.find_nodes(op="call_function", target=c10d.all_reduce.default))
    assert [user.target for node in nodes for user in node.users] == [c10d.wait_tensor.default] * len(nodes)
    return [tuple(node.meta["val"].shape) for node in nodes]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("selection", ["top", "uniform"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_what_is_sent(axis: str, selection: str, graphs: list[Any]) -> None:
    """Compact gradients, and the full one where a refresh chooses by it."""
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4, axis=axis, selection=selection, step_in_backward=True)
    compiled = torch.compile(DistributedDataParallel(model), backend="grass", options={"compiler": "aot_eager"})
    for step in range(2):
        forms.loss_of(compiled(forms.batch(torch.float32, step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    compact = (4, forms.N) if axis == "rows" else (forms.M, 4)
    assert [sent(backward) for _, backward in graphs] == ([[(forms.M, forms.N)]] if selection == "top" else []) + [[compact]]


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
    assert chosen == ([[(forms.M, forms.N)]] if selection == "top" else [])


def test_one_process_sends_nothing(graphs: list[Any]) -> None:
    model = forms.LinearBias()
    optimizer = paper.AdamW(model.named_parameters(), rank=4)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    forms.loss_of(compiled(forms.batch(torch.float32))).backward()
    optimizer.step()
    assert graphs and all(sent(backward) == [] for _, backward in graphs)

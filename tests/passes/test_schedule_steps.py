"""Where the steps stand in a finished backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grass_compile.passes.backward.schedule_steps import steps
from grass_compile.passes.backward.verify import verify

from ..harness import moving
from .graphs import train

aten = torch.ops.aten


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
        verify(backward, moving("a.weight", "b.weight"))

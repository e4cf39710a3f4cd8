"""The graphs that the passes make, for every test here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from grass_compile.passes import pipeline
from grass_compile.passes.fx_utils import op_counts

aten = torch.ops.aten


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, fx.GraphModule]]:
    """The forward and the backward of each pair that runs, finished, in order: refresh, regular."""
    made: list[tuple[fx.GraphModule, fx.GraphModule]] = []
    traced: set[pipeline.Plan] = set()
    forwards: dict[Any, fx.GraphModule] = {}
    transform, finish_forward, finish_backward = pipeline.transform, pipeline.finish_forward, pipeline.finish_backward

    def watched_transform(*args: Any, decide: Callable[..., pipeline.Plan], **kwargs: Any) -> Any:
        def watched(found: pipeline.Analysis) -> pipeline.Plan:
            plan = decide(found)
            assert plan not in traced, "partitioned twice"
            traced.add(plan)
            return plan

        return transform(*args, decide=watched, **kwargs)

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

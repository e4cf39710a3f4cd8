"""The lists of passes: what may be left out, what may be added, and what caches know of it."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import pytest
import torch
from torch import fx

import grass_compile
from grass_compile import _aot, ops
from grass_compile.backend import kernels
from grass_compile.config import BackendOptions
from grass_compile.passes import pipeline
from grass_compile.passes.backward.schedule_steps import steps
from grass_compile.passes.context import PassContext
from grass_compile.passes.fx_utils import PROVENANCE, call

from .. import forms, paper
from .graphs import train


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


@pytest.mark.parametrize("name", ["detect", "anchor", "lower_anchors", "schedule_steps"])
def test_without_an_essential_pass_everything_is_dense(name: str, graphs: list[Any]) -> None:
    optimizer = train(forms.Linear(), options={"disable_passes": [name]})
    assert not graphs
    assert "index" not in next(iter(optimizer.state.values()))


def test_model_without_projected_weights_is_compiled_as_it_is(graphs: list[Any]) -> None:
    train(forms.Linear(), rank=None)
    assert not graphs


def test_partitioner_key_covers_the_plan() -> None:
    one, other = _aot.Partitioner(lambda *a, **k: None, "x"), _aot.Partitioner(lambda *a, **k: None, "y")  # type: ignore[arg-type, return-value]
    assert one.uuid() != other.uuid() and one.__getstate__() == {"function": None, "key": "x"}


SEEN: list[str] = []


def note(gm: fx.GraphModule, context: PassContext) -> int:
    """A user's pass that looks."""
    SEEN.append("joint" if context.plan is None or (context.interface is None and not context.actions) else "backward")
    return 0


def double(gm: fx.GraphModule, context: PassContext) -> int:
    """A user's pass that doubles every compact gradient before its step."""
    for step in steps(gm):
        with gm.graph.inserting_before(step):
            twice = call(gm.graph, torch.ops.aten.mul.Tensor, step.args[0], 2)
        step.update_arg(0, twice)
    return len(steps(gm))


def test_passes_from_outside_run_in_their_lists() -> None:
    SEEN.clear()
    train(forms.Linear(), options={"joint_passes": (note,), "backward_passes": [note]})
    assert SEEN == ["joint", "backward", "backward"]  # a refresh and a regular step


def test_pass_from_outside_changes_what_is_computed() -> None:
    """With an SGD step, twice the gradient moves the weight twice as far."""
    moved = []
    for options in ({}, {"backward_passes": (double,)}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = forms.Linear()
        before = model.w.detach().clone()
        optimizer = paper.SGD(model.named_parameters(), lr=0.1, rank=forms.RANK, step_in_backward=True)
        compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", **options})
        forms.loss_of(compiled(forms.batch(torch.float32))).backward()
        optimizer.step()
        moved.append(model.w.detach() - before)
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_what_is_no_pass_is_refused() -> None:
    for wrong in ("normalize", (3,), [note, None]):
        with pytest.raises(grass_compile.ConfigError, match=r"options\['joint_passes'\] must be functions pass_\(gm, context\)"):
            BackendOptions.parse({"joint_passes": wrong}, None, pipeline.PASSES)


def test_passes_from_outside_are_part_of_the_cache_key() -> None:
    keys = [
        BackendOptions.parse(options, None, ()).passes_key for options in ({}, {"joint_passes": note}, {"joint_passes": double})
    ]
    assert keys[0] == "" and len(set(keys)) == 3
    assert keys[1].startswith("tests.passes.test_pipeline.note:")
    again = BackendOptions.parse({"joint_passes": note}, None, ())
    assert again.passes_key == keys[1] and hash(again) == hash(BackendOptions.parse({"joint_passes": (note,)}, None, ()))


def test_cache_key_covers_the_whole_package() -> None:
    """A file outside of the backend's folder counts too."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(grass_compile.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    assert kernels.source_hash() == digest.hexdigest()


def test_difference_of_operators_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="grass_compile.passes.pipeline"):
        train(forms.Linear(), steps=1, axis="rows")
    lines = [record.message for record in caplog.records if record.message.startswith("rewrite: 1 changes")]
    assert lines and "'grass_compile.gather.default': 1" in lines[0]

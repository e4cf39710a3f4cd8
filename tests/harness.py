"""Run the compiled path and the eager oracle side by side, and get at joint graphs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import grass_compile
from grass_compile import _torch
from grass_compile.config import SiteConfig
from grass_compile.passes.pipeline import find
from grass_compile.passes.records import Analysis, Site, WeightInput
from grass_compile.runtime.reference import ReferenceAdamW
from grass_compile.runtime.rules import AdamWRule

KEYWORDS = dict(lr=1e-2, eps=1e-3, weight_decay=0.0, update_proj_gap=3)


@dataclasses.dataclass
class Pair:
    """A model trained by the compiled path and a copy trained by the oracle."""

    model: nn.Module
    optimizer: grass_compile.AdamW
    compiled: Callable[..., Any]
    twin: nn.Module
    oracle: ReferenceAdamW

    def step(self, loss_of: Callable[[Any], Tensor], *inputs: Any, **keywords: Any) -> tuple[float, float]:
        """One training step of both; returns both losses."""
        loss = loss_of(self.compiled(*inputs, **keywords))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        expected = loss_of(self.twin(*inputs, **keywords))
        expected.backward()
        self.oracle.step()
        return float(loss.detach()), float(expected.detach())

    def difference(self) -> float:
        """The largest absolute difference between corresponding parameters."""
        pairs = zip(self.model.parameters(), self.twin.parameters(), strict=True)
        return max(float((p.detach().double() - q.detach().double()).abs().max()) for p, q in pairs)


def pair(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    compiler: str = "aot_eager",
    rank: int,
    axis: str = "auto",
    **keywords: Any,
) -> Pair:
    """Set up both sides; the oracle projects what `grass_compile.explain` says."""
    twin = copy.deepcopy(model)
    asked = {**KEYWORDS, **keywords}
    extra = {key: asked.pop(key) for key in ("exclude",) if key in asked}
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=rank, axis=axis, **asked, **extra)
    report = grass_compile.explain(model, *inputs, optimizer=optimizer)
    projected = {row.name: (row.dim, row.rank) for row in report if row.projected}
    oracle = ReferenceAdamW(twin.named_parameters(), projected=projected, **asked)
    compiled = torch.compile(model, backend="grass", options={"compiler": compiler})
    return Pair(model, optimizer, compiled, twin, oracle)


@dataclasses.dataclass
class Joint:
    """A joint graph and its parameters."""

    gm: fx.GraphModule
    num_fwd_outputs: int
    names: dict[int, str]

    def weights(self, rank: int = 4, axis: str = "rows", **refusals: str) -> tuple[WeightInput, ...]:
        """Requests for every parameter of the graph."""
        config = SiteConfig(rank, axis, "reset", False, 1.0, AdamWRule())  # type: ignore[arg-type]
        return tuple(WeightInput(name, position, config, refusals.get(name)) for position, name in self.names.items())

    def find(self, rank: int = 4, axis: str = "rows", **refusals: str) -> tuple[tuple[Site, ...], Analysis]:
        """Run detection for every parameter."""
        return find(self.gm, weights=self.weights(rank, axis, **refusals), num_fwd_outputs=self.num_fwd_outputs)


class _GotIt(Exception):
    pass


def joint_graph(model: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> Joint:
    """The joint graph of ``model`` as AOTAutograd hands it to a partitioner (Inductor's decompositions, no Inductor)."""
    found: list[Joint] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured, _ = _torch.capture(gm, example_inputs)

        def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
            found.append(Joint(joint, num_fwd_outputs, dict(captured.parameters)))
            raise _GotIt

        with contextlib.suppress(_GotIt):
            _torch.compile_graph(
                captured, _torch.with_inputs(captured, (), ()), captured.example_inputs,
                compiler="aot_eager", mode="default", patches={}, partition=partition, key="test",
            )  # fmt: skip
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return found[0]


def products(gm: fx.GraphModule, shape: tuple[int, ...]) -> int:
    """How many matrix products of a graph give ``shape``, in either orientation."""
    targets = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
    shapes = [tuple(node.meta["val"].shape)[-2:] for node in gm.graph.nodes if node.target in targets]
    return sum(found in (shape, shape[::-1]) for found in shapes)

"""Run the compiled path and the eager oracle side by side, and get at joint graphs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import grass_compile
from grass_compile import _aot, _dynamo
from grass_compile.config import SiteConfig
from grass_compile.math.reference import CompactState, ReferenceAdamW
from grass_compile.math.selection import fill_with_noise
from grass_compile.optim.rules import AdamWRule
from grass_compile.passes.pipeline import find
from grass_compile.passes.records import Analysis, Site, WeightInput

from . import paper

KEYWORDS = dict(lr=1e-2, eps=1e-3, weight_decay=0.0, update_proj_gap=3)


class Oracle(ReferenceAdamW):
    """The reference, with several backwards for one step and clipping.

    Of a refresh, the first backward chooses the rows: call `choose` after it. `step` does so where nobody has. (Of several
    regions in one backward, or several forwards, the last forward's is the first.) The oracle forms full gradients all the same,
    and cuts the rows out where a norm is wanted.

    Args:
        *args: as of the reference.
        max_grad_norm: clip by the common norm of the dense gradients and the selected rows.
        adopted: the first step is that of a script's own optimizer: the sum of all micro-batches chooses the rows, and clipping
            is by the norm of the full gradients.
        **keywords: as of the reference.
    """

    def __init__(self, *args: Any, max_grad_norm: float | None = None, adopted: bool = False, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.max_grad_norm, self.adopted = max_grad_norm, adopted
        self.grad_norm = 0.0
        self.margin = float("inf")
        self._chosen: list[CompactState] = []

    @torch.no_grad()
    def choose(self, **gradients: Tensor) -> None:
        """Choose rows from ``gradients``, or what ``.grad`` holds now, if a refresh is due and they are not chosen yet."""
        if self.adopted and self.updates == 0:
            return
        for name, (dim, rank) in self.projected.items():
            gradient = gradients.get(name, self.parameters[name].grad)
            if self.due(name) and gradient is not None and not self._is_chosen(self.state.get(name)):
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                self.state[name] = self._refreshed(name, wide, dim, rank)

    def _is_chosen(self, state: CompactState | None) -> bool:
        return any(state is other for other in self._chosen)

    def _refreshed(self, name: str, gradient: Tensor, dim: int, rank: int) -> CompactState:
        old = self.state.get(name)
        if old is not None and self._is_chosen(old):
            return old
        norms = gradient.norm(dim=1 - dim).sort(descending=True).values.tolist()
        if rank < len(norms):
            self.margin = min(self.margin, norms[rank - 1] / norms[rank] - 1)
        self._chosen.append(super()._refreshed(name, gradient, dim, rank))
        return self._chosen[-1]

    @torch.no_grad()
    def step(self) -> None:
        """Clip if that was asked for, then as the reference."""
        self.choose()
        if self.max_grad_norm is not None:
            self._clip(self.max_grad_norm)
        super().step()
        self._chosen.clear()

    def _clip(self, max_norm: float) -> None:
        squares = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.double()
            if name in self.projected and not (self.adopted and self.updates == 0):
                gradient = gradient.index_select(self.projected[name][0], self.state[name].index)
            squares.append(gradient.square().sum())
        self.grad_norm = float(torch.stack(squares).sum().sqrt())
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, max_norm / (self.grad_norm + 1e-6)))


@dataclasses.dataclass
class Pair:
    """A model trained by the compiled path and a copy trained by the oracle."""

    model: nn.Module
    optimizer: grass_compile.AdamW
    compiled: Callable[..., Any]
    twin: nn.Module
    oracle: Oracle

    def step(self, loss_of: Callable[[Any], Tensor], *inputs: Any, **keywords: Any) -> tuple[float, float]:
        """One training step of both; returns both losses."""
        return self.update(lambda model: loss_of(model(*inputs, **keywords)))

    def update(self, *losses: Callable[[Callable[..., Any]], Tensor]) -> tuple[float, float]:
        """One training step of both from several losses, each with a backward of its own; returns both sums.

        Args:
            *losses: functions of the model; all but the last run under ``optimizer.accumulate()``.
        """
        values = []
        for number, loss_of in enumerate(losses):
            last = number == len(losses) - 1
            with contextlib.nullcontext() if last else self.optimizer.accumulate():
                loss = loss_of(self.compiled)
                loss.backward()
            expected = loss_of(self.twin)
            expected.backward()
            self.oracle.choose()
            values.append((float(loss.detach()), float(expected.detach())))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.oracle.step()
        own, theirs = zip(*values, strict=True)
        return sum(own), sum(theirs)

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
    extra = {key: asked.pop(key) for key in ("exclude", "step_in_backward", "stagger", "seed", "nonfinite") if key in asked}
    optimizer = paper.AdamW(model.named_parameters(), rank=rank, axis=axis, **asked, **extra)
    report = grass_compile.explain(model, *inputs, optimizer=optimizer)
    projected = {row.name: (row.dim, row.rank) for row in report if row.projected}
    records = {record.name: record for record in optimizer._manager.records.values()}

    def noise(name: str, updates: int) -> Tensor:
        record, drawn = records[name], torch.empty(max(records[name].parameter.shape), dtype=torch.float64)
        drawn = drawn[: record.parameter.shape[projected[name][0]]]
        fill_with_noise(drawn, record.options.seed, record.number, updates)
        return drawn

    offsets = {name: records[name].offset for name in projected}
    oracle = Oracle(twin.named_parameters(), projected=projected, noise=noise, offsets=offsets, **asked)
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
        captured, _ = _dynamo.capture(gm, example_inputs)

        def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
            found.append(Joint(joint, num_fwd_outputs, dict(captured.parameters)))
            raise _GotIt

        with contextlib.suppress(_GotIt):
            _aot.compile_graph(
                captured, _dynamo.with_inputs(captured, (), ()), captured.example_inputs,
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


def moving(*names: str) -> Any:
    """The context of a backward in which these weights move."""
    projections = [types.SimpleNamespace(name=name) for name in names]
    return types.SimpleNamespace(planned=types.SimpleNamespace(projections=projections), actions=["step"] * len(names))


class Attention(nn.Module):
    """Three weights that read the same activations, and one that does not."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, out, bias=False) for out in (width, width // 2, width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = (q[..., : k.shape[-1]] @ k.transpose(-1, -2)).softmax(-1)
        return self.o(torch.cat((weights @ v, q[..., k.shape[-1] :]), -1))  # type: ignore[no-any-return]


def batch(step: int, width: int = 16, tokens: int = 11) -> Tensor:
    return torch.randn(3, tokens, width, generator=torch.Generator().manual_seed(step))

"""``grass_compile.plan``: does it fit, before it runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .. import _simulate
from ..checks import rank_along
from ..errors import ConfigError
from . import methods
from .ledger import Peak
from .models import as_fake, changed_at
from .request import OPTIMIZERS, OptimizerFactory, Request, dtype_of, factory, hashable, loaded, loss_of, step_inputs, width_of
from .result import SLACK, Plan
from .spread import World, of_rank, sent
from .training import STEPS, Compile, Setup, Simulated, Step, blocks_of, simulate

T = TypeVar("T")

PHASES = ("forward", "backward", "update")


def plan(
    model: str | nn.Module,
    *,
    batch: int,
    seq: int,
    optimizer: str | OptimizerFactory = "AdamW",
    dtype: str | None = "bf16",
    device: str = "cuda",
    compile: Compile = "blocks",
    checkpointing: bool = False,
    inputs: Callable[[], Mapping[str, Any]] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    world: int | str = 1,
    sharding: str | None = None,
    **keywords: Any,
) -> Plan:
    """Say how many bytes training needs, without a GPU, without weights and without memory.

    The model is compiled as for training, and the code that Inductor generates runs for four steps on tensors that have shapes
    but no memory: so the peak is that of the schedule which will run, with what autograd keeps between compiled regions, the
    optimizer's state and its own temporaries. Nothing is trained, and a module that is passed in is not changed; compiled
    functions of this process are forgotten (``torch._dynamo.reset()``).

    Args:
        model: a built-in name (``llama-13b``; `NAMES`), the path of a Hugging Face ``config.json`` or of a folder with one,
            ``module:function`` that returns a module, or a module.
        batch: sequences in a batch.
        seq: tokens in a sequence.
        optimizer: one of this package by name, ``"AdamW"``, ``"Muon"``, ...; one of others for comparison: ``"adamw"``,
            ``"adamw8bit"``, ``"galore"``, ``"apollo"``, ``"lora"``, ``"muon"``, ``"flashoptim"``, whose states are counted by
            their shapes; or a function that makes an optimizer of the model.
        dtype: of the weights: ``"bf16"``, ``"fp16"``, ``"fp32"``; None: as they come.
        device: for which code is generated, ``"cuda"`` (needs Triton, not a GPU) or ``"cpu"``.
        compile: ``"blocks"``, one by one, or ``"whole"``.
        checkpointing: compute activations again in the backward, block by block (``model.gradient_checkpointing_enable()``).
        inputs: makes the keyword arguments of the model; by default ``input_ids`` and ``labels``, ``[batch, seq]``.
        loss: makes the loss of what the model returns; by default its ``.loss``.
        world: ranks; ``"2x4"``, replicas times shards, for ``sharding="hsdp"``. The plan is then that of each rank, by arithmetic
            upon that of one process, with the bytes that it sends; ``batch`` is that of a rank.
        sharding: ``"ddp"``, ``"fsdp2"``, ``"hsdp"`` or ``"tp"``.
        **keywords: of the optimizer, ``rank`` first of all. (``rank`` is also that of galore, apollo and lora.)

    Returns:
        the plan; print it.

    Raises:
        ConfigError: no such model, optimizer or keyword; a model that needs numbers to run; Triton is missing.
    """
    request = Request(
        model,
        batch,
        seq,
        optimizer,
        dtype,
        device,
        compile,
        checkpointing,
        inputs,
        loss,
        hashable(keywords),
        World.parse(world, sharding),
    )
    return of_request(request)


def of_request(request: Request) -> Plan:
    """`plan`; what differs in ``world`` alone is simulated once."""
    return _plan(request, *_simulated(dataclasses.replace(request, world=None)))


def _once(function: Callable[..., T]) -> Callable[..., T]:
    """Keep what was simulated of a model that is named. A module may change between two plans; that a file has, its time says."""

    @functools.lru_cache(maxsize=256)
    def kept(time: int, keywords: str, request: Request, *rest: Any) -> T:
        return function(request, *rest)

    @functools.wraps(function)
    def once(request: Request, *rest: Any) -> T:
        if isinstance(request.model, nn.Module):
            return function(request, *rest)
        return kept(changed_at(request.model), repr(request.keywords), request, *rest)  # True equals 1, and means something else

    return once


@_once
def _simulated(request: Request) -> tuple[Simulated, int, tuple[str, ...]]:
    """What came out, the bytes of a state that was not simulated, and notes."""
    model = loaded(request)
    rank = dict(request.keywords).get("rank")
    if isinstance(rank, float):
        rank = rank_along(rank, width_of(model))
    if request.optimizer == "lora":
        return _adapted(request, rank or 16), 0, ()
    if isinstance(request.optimizer, str) and request.optimizer in methods.DENSE:
        with _simulate.fake(_simulate.SimulationMode({})):
            shadow = as_fake(model, dtype_of(request))
            state = methods.DENSE[request.optimizer](shadow, blocks_of(shadow), rank or 128)
        note = f"the state of {request.optimizer} is counted by its shapes, and what its step needs beside it is not"
        return (
            _dense(dataclasses.replace(request, optimizer="adamw", keywords=()), request.optimizer == "flashoptim"),
            state,
            (note,),
        )
    if isinstance(rank, int) and rank > (width := width_of(model)):
        raise ConfigError(f"rank={rank} is above the width of the model, {width}: there would be nothing to save.")
    return simulate(dataclasses.replace(setup_of(request, model), optimizer=factory(request)), STEPS), 0, ()


def setup_of(request: Request, model: nn.Module) -> Setup:
    """A request as it is simulated, without an optimizer."""
    return Setup(
        build=lambda: as_fake(model, dtype_of(request), request.checkpointing).train(),
        inputs=functools.partial(step_inputs, request),
        loss=request.loss or loss_of,
        optimizer=None,
        device=request.device,
        compile=request.compile,
    )


@_once
def _dense(request: Request, release: bool) -> Simulated:
    """A model whose gradients are formed whole, and dropped one by one or left where they are; shared by all such methods."""
    return simulate(dataclasses.replace(setup_of(request, loaded(request)), release=release), 2)


def _adapted(request: Request, rank: int) -> Simulated:
    model = loaded(request)

    def build() -> nn.Module:
        shadow = as_fake(model, dtype_of(request), request.checkpointing).train()
        return methods.with_adapters(shadow, blocks_of(shadow), rank)

    return simulate(dataclasses.replace(setup_of(request, model), build=build, optimizer=methods.adapter_optimizer), 2)


def _plan(request: Request, found: Simulated, state: int, notes: Sequence[str]) -> Plan:
    moments = [_moment(request.world, found, step, phase, state) for step in found.steps for phase in PHASES]
    largest = max(moments, key=lambda moment: moment.bytes)
    method = request.optimizer if isinstance(request.optimizer, str) else getattr(request.optimizer, "__name__", "an optimizer")
    settings = {
        "batch": request.batch,
        "seq": request.seq,
        "dtype": request.dtype,
        "device": request.device,
        "compile": request.compile,
        "checkpointing": request.checkpointing,
        **dict(request.keywords),
    }
    if request.world is not None:
        settings |= {"sharding": request.world.sharding, "replicas": request.world.replicas, "shards": request.world.shards}
    return Plan(
        model=request.model if isinstance(request.model, str) else type(request.model).__name__,
        method=f"grass {method}" if method in OPTIMIZERS else method,
        settings=settings,
        parameters=found.parameters,
        peak_bytes=largest.bytes,
        phase=f"the {largest.phase} of step {found.steps.index(largest.step) + 1}",
        bytes=largest.kinds,
        steps=tuple({m.phase: m.bytes for m in moments if m.step is step} for step in found.steps),
        saved_bytes=found.steps[-1].saved,
        layers=getattr(largest.step, largest.phase).owners,
        notes=(*notes, *_notes(request, found)),
        sent=_sent(request, found),
    )


@dataclasses.dataclass(frozen=True)
class _Moment:
    """The peak of a part of a step, on a rank."""

    step: Step
    phase: str
    kinds: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.kinds.values())


def _moment(world: World | None, found: Simulated, step: Step, phase: str, state: int) -> _Moment:
    peak: Peak = getattr(step, phase)
    kinds = {**peak.kinds, SLACK: peak.slack}
    kinds["dense state"] += state
    if world is not None:
        kinds = of_rank(kinds, found.inside, found.outside, found.gradients, phase, world)
    return _Moment(step, phase, kinds)


def _sent(request: Request, found: Simulated) -> dict[str, int]:
    if request.world is None:
        return {}
    weights = found.outside + sum(found.inside.values())
    itemsize = round(weights / found.parameters)  # they travel in the dtype of the weights
    return sent(weights, found.compact * itemsize, found.gradients, request.world)


def _notes(request: Request, found: Simulated) -> list[str]:
    notes = []
    ours = not isinstance(request.optimizer, str) or request.optimizer in OPTIMIZERS
    if ours and found.dense:
        some = ", ".join(found.dense[:4]) + (", ..." if len(found.dense) > 4 else "")
        notes.append(f"{len(found.dense)} matrices of blocks are trained densely ({some}); grass_compile.explain says why")
    if found.reads:
        notes.append("the forward reads numbers, which were taken for zero: what it does upon others is not in this plan")
    if request.world is not None:
        if request.world.sharding == "tp":
            notes.append(
                "activations are counted, and not sent, as on one process: tensor parallelism divides them, and sends them"
            )
        notes.append("the plan of a rank is arithmetic upon that of one process, and has not been measured")
    if request.device == "cuda":
        notes.append("the context of the GPU and the workspaces of its libraries come on top")
    return notes

"""``grass_compile.plan``: does it fit, before it runs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..optim import optimizers
from . import methods
from .models import as_fake, load
from .result import SLACK, Plan
from .training import STEPS, Compile, Setup, Simulated, Step, blocks_of, simulate

OPTIMIZERS = ("AdamW", "AdamW8bit", "Muon", "Lion", "SGD", "Adafactor", "Apollo", "Sketchy")
"""Those of this package."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

OTHERS = (*methods.DENSE, "lora")
"""What others train with."""

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned; see `plan`."""

    model: str | nn.Module
    batch: int
    seq: int
    optimizer: str | OptimizerFactory = "AdamW"
    dtype: str | None = "bf16"
    device: str = "cuda"
    compile: Compile = "blocks"
    checkpointing: bool = False
    inputs: Callable[[], Mapping[str, Any]] | None = None
    loss: Callable[[Any], Tensor] | None = None
    keywords: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}, or None for a model as it comes.")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device!r} must be 'cpu' or 'cuda'.")
        if self.compile not in ("blocks", "whole"):
            raise ConfigError(f"compile={self.compile!r} must be 'blocks' or 'whole'.")
        if isinstance(self.optimizer, str) and self.optimizer not in (*OPTIMIZERS, *OTHERS):
            raise ConfigError(
                f"optimizer={self.optimizer!r} must be one of this package's, {', '.join(OPTIMIZERS)}, one to compare with, "
                f"{', '.join(OTHERS)}, or a function that makes an optimizer of the model."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            _need_triton()


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
        **keywords: of the optimizer, ``rank`` first of all. (``rank`` is also that of galore, apollo and lora.)

    Returns:
        the plan; print it.

    Raises:
        ConfigError: no such model, optimizer or keyword; a model that needs numbers to run; Triton is missing.
    """
    request = Request(
        model, batch, seq, optimizer, dtype, device, compile, checkpointing, inputs, loss, tuple(sorted(keywords.items()))
    )
    return of_request(request)


@functools.lru_cache(maxsize=256)
def of_request(request: Request) -> Plan:
    """`plan`; the same request is planned once."""
    keywords = dict(request.keywords)
    if request.optimizer == "lora":
        return _plan(request, _adapted(dataclasses.replace(request, optimizer="lora"), keywords.get("rank", 16)), 0, ())
    if isinstance(request.optimizer, str) and request.optimizer in methods.DENSE:
        model = loaded(request)
        state = methods.DENSE[request.optimizer](model, blocks_of(model), keywords.get("rank", 128))
        note = f"the state of {request.optimizer} is counted by its shapes, and what its step needs beside it is not"
        shared = dataclasses.replace(request, optimizer="adamw", keywords=())
        return _plan(request, _dense(shared, request.optimizer == "flashoptim"), state, (note,))
    model = loaded(request)
    if isinstance(rank := keywords.get("rank"), int) and rank > (width := width_of(model)):
        raise ConfigError(f"rank={rank} is above the width of the model, {width}: there would be nothing to save.")
    found = simulate(dataclasses.replace(_setup(request, model), optimizer=factory(request)), STEPS)
    return _plan(request, found, 0, ())


def width_of(model: nn.Module) -> int:
    """The shorter side that most matrices of a model have: its width."""
    sides = [min(p.shape) for p in model.parameters() if p.dim() == 2]
    if not sides:
        raise ConfigError(f"{type(model).__name__} has no matrix, so there is nothing to project.")
    return max(set(sides), key=sides.count)


def loaded(request: Request) -> nn.Module:
    """The model of a request, without memory where it can be."""
    return load(request.model, _dtype(request), request.checkpointing)


def _dtype(request: Request) -> torch.dtype | None:
    return DTYPES[request.dtype] if request.dtype is not None else None


def _setup(request: Request, model: nn.Module) -> Setup:
    return Setup(
        build=lambda: as_fake(model, _dtype(request)).train(),
        inputs=functools.partial(step_inputs, request),
        loss=request.loss or _loss,
        optimizer=None,
        device=request.device,
        compile=request.compile,
    )


@functools.lru_cache(maxsize=32)
def _dense(request: Request, release: bool) -> Simulated:
    """A model whose gradients are formed whole, and dropped one by one or left where they are; shared by all such methods."""
    return simulate(dataclasses.replace(_setup(request, loaded(request)), release=release), 2)


def _adapted(request: Request, rank: int) -> Simulated:
    model = loaded(request)

    def build() -> nn.Module:
        return methods.with_adapters(as_fake(model, _dtype(request)).train(), blocks_of(model), rank)

    return simulate(dataclasses.replace(_setup(request, model), build=build, optimizer=methods.adapter_optimizer), 2)


def factory(request: Request) -> OptimizerFactory:
    """What makes the optimizer of a request.

    Raises:
        ConfigError: ``rank`` is missing; what is returned raises it for keywords that the optimizer does not take.
    """
    if not isinstance(request.optimizer, str):
        return request.optimizer
    made: Any = getattr(optimizers, request.optimizer)
    given = {"lr": 1e-3, **dict(request.keywords)}
    if request.device == "cuda" and "foreach" in inspect.signature(made).parameters:
        given.setdefault("foreach", not given.get("fused", False))  # as torch decides on a GPU, and would not for a CPU's tensors
    if given.get("rank") is None:
        raise ConfigError("rank= is missing: how many rows or columns of each weight are to be trained at a time, or a fraction.")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        try:
            optimizer: torch.optim.Optimizer = made(model.named_parameters(), **given)
        except TypeError as error:
            raise ConfigError(f"{request.optimizer} does not take these keywords: {error}") from error
        return optimizer

    return make


def _plan(request: Request, found: Simulated, state: int, notes: Sequence[str]) -> Plan:
    ours = not isinstance(request.optimizer, str) or request.optimizer in OPTIMIZERS
    if ours and found.dense:
        some = ", ".join(found.dense[:4]) + (", ..." if len(found.dense) > 4 else "")
        notes = (*notes, f"{len(found.dense)} matrices of blocks are trained densely ({some}); grass_compile.explain says why")
    if found.reads:
        notes = (*notes, "the forward reads numbers, which were taken for zero: what it does upon others is not in this plan")
    if request.device == "cuda":
        notes = (*notes, "the context of the GPU and the workspaces of its libraries come on top")
    largest = max(found.steps, key=lambda step: step.peak.bytes + step.peak.slack)
    peak = largest.peak
    kinds = {**peak.kinds, SLACK: peak.slack}
    kinds["dense state"] += state
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
    return Plan(
        model=request.model if isinstance(request.model, str) else type(request.model).__name__,
        method=f"grass {method}" if method in OPTIMIZERS else method,
        settings=settings,
        parameters=found.parameters,
        peak_bytes=peak.bytes + peak.slack + state,
        phase=f"the {largest.phase} of step {found.steps.index(largest) + 1}",
        bytes=kinds,
        steps=tuple(_by_part(step, state) for step in found.steps),
        saved_bytes=found.steps[-1].saved,
        layers=peak.owners,
        notes=tuple(notes),
    )


def _by_part(step: Step, state: int) -> dict[str, int]:
    return {name: getattr(step, name).bytes + getattr(step, name).slack + state for name in ("forward", "backward", "update")}


def step_inputs(request: Request) -> dict[str, Any]:
    """The keyword arguments of the model."""
    if request.inputs is not None:
        return dict(request.inputs())
    tokens = torch.zeros(request.batch, request.seq, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}


def _loss(result: Any) -> Tensor:
    loss = getattr(result, "loss", result)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(f"the model returns {type(result).__name__} without a loss; say loss= how one is made of it.")
    return loss


def _need_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "device='cuda' plans the code that Inductor generates for a GPU, which needs Triton: pip install triton. Without it, "
            "device='cpu' plans the code for a CPU, which differs by a few percent."
        ) from error

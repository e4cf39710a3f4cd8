"""``grass_compile.plan``: does it fit, before it runs."""

from __future__ import annotations

import dataclasses
import functools
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
    dtype = DTYPES[request.dtype] if request.dtype is not None else None
    model = load(request.model, dtype, request.checkpointing)
    keywords, notes = dict(request.keywords), []
    setup = Setup(
        build=lambda: as_fake(model, dtype).train(),
        inputs=functools.partial(_inputs, request),
        loss=request.loss or _loss,
        optimizer=None,
        device=request.device,
        compile=request.compile,
    )
    if request.optimizer == "lora":
        rank = keywords.get("rank", 16)
        found = simulate(
            dataclasses.replace(
                setup,
                build=lambda: methods.with_adapters(as_fake(model, dtype).train(), blocks_of(model), rank),
                optimizer=methods.adapter_optimizer,
            ),
            2,
        )
        return _plan(request, model, found, 0, ())
    if isinstance(request.optimizer, str) and request.optimizer in methods.DENSE:
        release = request.optimizer == "flashoptim"
        found = simulate(dataclasses.replace(setup, release=release), 2)
        state = methods.DENSE[request.optimizer](model, blocks_of(model), keywords.get("rank", 128))
        notes.append(f"the state of {request.optimizer} is counted by its shapes, and what its step needs beside it is not")
        return _plan(request, model, found, state, notes)
    found = simulate(dataclasses.replace(setup, optimizer=_factory(request, keywords)), STEPS)
    return _plan(request, model, found, 0, notes)


def _factory(request: Request, keywords: Mapping[str, Any]) -> OptimizerFactory:
    if not isinstance(request.optimizer, str):
        return request.optimizer
    made: Any = getattr(optimizers, request.optimizer)
    given = {"lr": 1e-3, **keywords}
    if given.get("rank") is None:
        raise ConfigError("rank= is missing: how many rows or columns of each weight are to be trained at a time, or a fraction.")

    def make(model: nn.Module) -> torch.optim.Optimizer:
        try:
            optimizer: torch.optim.Optimizer = made(model.named_parameters(), **given)
        except TypeError as error:
            raise ConfigError(f"{request.optimizer} does not take these keywords: {error}") from error
        return optimizer

    return make


def _plan(request: Request, model: nn.Module, found: Simulated, state: int, notes: Sequence[str]) -> Plan:
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
        model=request.model if isinstance(request.model, str) else type(model).__name__,
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


def _inputs(request: Request) -> dict[str, Any]:
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

"""What is to be planned: a model, a batch, an optimizer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import ConfigError
from ..optim import optimizers
from . import methods
from .models import fake_like, load
from .spread import World
from .training import Compile

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
    world: World | None = None

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
        if self.inputs is not None and not callable(self.inputs):
            raise ConfigError("inputs= must be a function that returns the keyword arguments of the model.")
        keywords = dict(self.keywords)
        checks.rank("rank", keywords.get("rank"))
        others = isinstance(self.optimizer, str) and self.optimizer in OTHERS
        unused = [name for name in keywords if not isinstance(self.optimizer, str) or (others and name != "rank")]
        if unused:
            raise ConfigError(f"{unused[0]}= is not read with optimizer={self.optimizer!r}.")
        if others and self.world is not None and self.world.sharding == "tp":
            raise ConfigError("sharding='tp' is planned for the optimizers of this package alone.")
        if self.device == "cuda" and not torch.cuda.is_available():
            _need_triton()


def hashable(keywords: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Keywords of an optimizer, lists as tuples.

    Raises:
        ConfigError: a value can be no keyword.
    """
    found = tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in keywords.items()))
    try:
        hash(found)
    except TypeError as error:
        raise ConfigError(f"keywords of an optimizer are numbers, texts and lists of these, got {dict(found)}.") from error
    return found


def loaded(request: Request) -> nn.Module:
    """The model of a request, without memory where it can be."""
    return load(request.model, dtype_of(request), request.checkpointing)


def dtype_of(request: Request) -> torch.dtype | None:
    """Of the weights; None: as they come."""
    return DTYPES[request.dtype] if request.dtype is not None else None


def width_of(model: nn.Module) -> int:
    """The shorter side that most matrices of a model have: its width."""
    sides = [min(p.shape) for p in model.parameters() if p.dim() == 2]
    if not sides:
        raise ConfigError(f"{type(model).__name__} has no matrix, so there is nothing to project.")
    return max(set(sides), key=sides.count)


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


def step_inputs(request: Request) -> dict[str, Any]:
    """The keyword arguments of the model."""
    if request.inputs is not None:
        return {name: fake_like(value, None) if isinstance(value, Tensor) else value for name, value in request.inputs().items()}
    tokens = torch.zeros(request.batch, request.seq, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens}


def loss_of(result: Any) -> Tensor:
    """The loss that a model of transformers returns."""
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

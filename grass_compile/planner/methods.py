"""What others train with, for comparison: the bytes of their states, by the shapes, upon the same simulated step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

BITSANDBYTES_BLOCK = 256
"""Numbers that share a scale in the 8-bit optimizers of bitsandbytes."""

BITSANDBYTES_LEAST = 4096
"""A smaller tensor has its state in 32 bits there."""

State = Callable[[nn.Module, Sequence[str], int], int]
"""``(model, blocks, rank)`` -> bytes beside weights and gradients."""


def linear_weights(model: nn.Module, blocks: Sequence[str]) -> list[Tensor]:
    """The weights of the linear layers in the blocks, which GaLore, APOLLO and LoRA project."""
    modules = (module for block in blocks for module in model.get_submodule(block).modules())
    return [module.get_parameter("weight") for module in modules if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by one matrix, GPT-2's way of writing it included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, blocks: Sequence[str], rank: int) -> int:
    """Two moments in the dtype of the weights (``torch.optim.AdamW(fused=True)``, which needs nothing beside)."""
    return sum(2 * p.numel() * p.element_size() for p in _trained(model))


def muon(model: nn.Module, blocks: Sequence[str], rank: int) -> int:
    """One buffer for each linear weight in a block (``torch.optim.Muon``), AdamW for the rest."""
    linear = {id(weight) for weight in linear_weights(model, blocks)}
    return sum((1 if id(p) in linear else 2) * p.numel() * p.element_size() for p in _trained(model))


def adamw8bit(model: nn.Module, blocks: Sequence[str], rank: int) -> int:
    """Two codes of a byte for each number and two scales for each block of 256 (bitsandbytes); small tensors in 32 bits."""
    sizes = [p.numel() for p in _trained(model)]
    return sum(8 * size if size < BITSANDBYTES_LEAST else 2 * size + 8 * math.ceil(size / BITSANDBYTES_BLOCK) for size in sizes)


def low_rank(model: nn.Module, blocks: Sequence[str], rank: int) -> int:
    """A projection of the shorter side and two moments ``[longer side, r]`` (galore-torch, and apollo-torch likewise)."""
    linear, total = {id(weight) for weight in linear_weights(model, blocks)}, 0
    for p in _trained(model):
        if id(p) in linear:
            r = min(rank, *p.shape)
            total += (2 * max(p.shape) + min(p.shape)) * r * p.element_size()
        else:
            total += 2 * p.numel() * p.element_size()
    return total


def five_bytes(model: nn.Module, blocks: Sequence[str], rank: int) -> int:
    """Three bytes beside a weight of two, of correction and moments, and gradients that are dropped one by one (FlashOptim)."""
    return sum(3 * p.numel() for p in _trained(model))


DENSE: dict[str, State] = {
    "adamw": adamw,
    "muon": muon,
    "adamw8bit": adamw8bit,
    "galore": low_rank,
    "apollo": low_rank,
    "flashoptim": five_bytes,
}
"""Methods that form whole gradients, and their states. ``flashoptim`` drops each gradient at once, the others keep them all."""


class LowRankAdapter(nn.Module):
    """A frozen linear layer with a trained low-rank one in fp32 beside it, as peft makes it."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base
        weight: Tensor = base.weight  # type: ignore[assignment]
        outs, ins = weight.shape if isinstance(base, nn.Linear) else weight.shape[::-1]
        r = min(rank, ins, outs)
        self.A = nn.Parameter(weight.new_empty(r, ins, dtype=torch.float32))
        self.B = nn.Parameter(weight.new_empty(outs, r, dtype=torch.float32))

    def __getattr__(self, name: str) -> Any:
        """What a model asks of the layer itself: its weight, its sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        """``W x + B A x``."""
        result: Tensor = self.base(x)
        return result + F.linear(F.linear(x.float(), self.A), self.B).to(result.dtype)


def with_adapters(model: nn.Module, blocks: Iterable[str], rank: int) -> nn.Module:
    """Freeze a model and put an adapter beside each linear layer of its blocks, in place.

    Raises:
        ConfigError: there is no such layer.
    """
    model.requires_grad_(False)
    found = [
        (f"{block}.{name}".rstrip("."), module)
        for block in blocks
        for name, module in model.get_submodule(block).named_modules()
        if _is_linear(module)
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layer in a block, so LoRA adapts nothing.")
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LowRankAdapter(module, rank))
    return model


def adapter_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW of the adapters."""
    return torch.optim.AdamW(_trained(model), fused=True)

"""What every benchmark trains: a stack of LLaMA-like blocks on one fixed random batch, and the settings of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64
"""Features of one attention head; a narrower model has a single head of its own width."""

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a block, by the last part of their names."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """One measurement, in plain values so that it can be handed to a fresh process as JSON.

    Attributes:
        method: A key of `benchmarks.methods.METHODS`.
        d: Model width.
        layers: Blocks in the stack.
        ffn: Width of the gated MLP.
        batch: Sequences in a batch.
        seq: Tokens in a sequence.
        rank: Rank of every low-rank method.
        dtype: Type of weights, activations and gradients ("bf16" has no fp32 copy of anything).
        threads: Intra-op threads.
        warmup: Steps before the measured ones. The first is a refresh, so two are the least that compile everything.
        steps: Measured regular steps.
        gap: Steps between refreshes. 0 means `warmup + steps`, which puts one refresh right after the measured steps.
        lr: Learning rate. The loss is of no interest; but below 4e-3 a bf16 norm weight near 1 stands still.
        blockwise: Compile each block by itself instead of the whole stack.
        micro_batches: Forwards and backwards for each step of the optimizer.
        memory: Measure memory after the timed steps; `benchmarks.compile_time` has no use for that.
        device: Where the model is.
    """

    method: str
    d: int = 768
    layers: int = 4
    ffn: int = 2048
    batch: int = 4
    seq: int = 256
    rank: int = 96
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int = 2
    warmup: int = 3
    steps: int = 10
    gap: int = 0
    lr: float = 1e-2
    blockwise: bool = False
    micro_batches: int = 1
    memory: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.warmup < 2:
            raise ValueError(f"warmup is {self.warmup}; at least 2: the first step is a refresh, the second regular")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; at least one step has to be measured")
        if self.gap < 0 or self.gap == 1:
            raise ValueError(f"gap is {self.gap}; it is 0 (automatic) or at least 2, else no step is a regular one")
        if self.d > HEAD_DIM and self.d % HEAD_DIM:
            raise ValueError(f"d is {self.d}; above {HEAD_DIM} it must be a multiple of it, the width of a head")

    @property
    def update_proj_gap(self) -> int:
        """Steps between refreshes, the automatic value resolved."""
        return self.gap or self.warmup + self.steps

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values; `Settings(**d)` turns them back."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm as in LLaMA: the mean in fp32, the product in the input's type."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d] -> [..., d]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class Block(nn.Module):
    """Causal attention and a SwiGLU MLP, each behind a norm and around it a residual. No linear layer has a bias."""

    def __init__(self, d: int, ffn: int) -> None:
        super().__init__()
        self.heads = max(1, d // HEAD_DIM)
        self.attention_norm, self.mlp_norm = RMSNorm(d), RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, d] -> [batch, seq, d]."""
        h = self.attention_norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.o(attended)
        h = self.mlp_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return out


class Stack(nn.Module):
    """Blocks and a loss, without embedding or head, so that what is measured is linear layers and little else."""

    def __init__(self, d: int, layers: int, ffn: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, ffn) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, d] -> the mean square of the last block's output, a 0-d fp32 tensor."""
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()

    def linear_weights(self) -> dict[str, nn.Parameter]:
        """The weights of the blocks' own linear layers by name; an adapter's are not among them."""
        return {
            name: weight
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear)
            and isinstance(weight := module.weight, nn.Parameter)
            and name.removesuffix(".base_layer").rpartition(".")[2] in LINEARS
        }


def build(settings: Settings) -> tuple[Stack, Tensor]:
    """The model and its input `[batch, seq, d]`, the same for every method and process."""
    torch.manual_seed(0)
    dtype = DTYPES[settings.dtype]
    with torch.device(settings.device):
        model = Stack(settings.d, settings.layers, settings.ffn).to(dtype)
        return model, torch.randn(settings.batch, settings.seq, settings.d).to(dtype)

"""Stochastic rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the expectation exact; infinities and NaN stay.

    Args:
        value: fp32.
        noise: whole numbers of 16 bits, ``int32``.
    """
    rounded = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)

"""How numbers are rounded to bf16."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS_AWAY = 2.0**-10
"""For a rate of decay up to this, ``w * (1 - rate)`` rounds to ``w`` again, whatever bf16 number ``w`` is: the next one toward
zero is at least ``2**-8 * |w|`` away, and what is nearer than half of that rounds back. (Twice as safe as it need be.)"""


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the expectation exact; infinities and NaN stay.

    Args:
        value: fp32.
        noise: whole numbers of 16 bits, ``int32``.
    """
    rounded = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)

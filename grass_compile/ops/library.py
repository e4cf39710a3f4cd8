"""The library that every operator of this package is defined in, and what they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("grass_compile", "DEF")


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is in a CPU's memory, where gathers and products want other layouts than on a GPU."""
    return tensor.device.type == "cpu"

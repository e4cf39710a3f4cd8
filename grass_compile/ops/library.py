"""The library that every operator of this package is defined in, and what they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import StateError

library = torch.library.Library("grass_compile", "DEF")


def refuse_to_run(*args: object) -> Tensor:
    """Refuse to run an operator that only stands for something else in graphs and is replaced before they run.

    Raises:
        StateError: always.
    """
    raise StateError(
        "a backward ran that grass_compile has not finished. Compiled autograd (torch._dynamo.config.compiled_autograd) takes "
        "graphs as they are before that, and is not supported: call backward() outside of it. No weight has moved."
    )


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is in a CPU's memory, where gathers and products want other layouts than on a GPU."""
    return tensor.device.type == "cpu"

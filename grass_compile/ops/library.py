"""The library that every operator of this package is defined in, and what they have in common."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

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


_laid_out_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("grass_laid_out_for", default=None)


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is in a CPU's memory, where gathers and products want other layouts than on a GPU."""
    return (_laid_out_for.get() or tensor.device.type) == "cpu"


@contextlib.contextmanager
def laid_out_for(device: str) -> Iterator[None]:
    """Inside, in this thread, operators lay out their results as on ``device``, for which code is generated."""
    token = _laid_out_for.set(device)
    try:
        yield
    finally:
        _laid_out_for.reset(token)

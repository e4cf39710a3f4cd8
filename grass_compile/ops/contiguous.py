"""``contiguous`` copies a matrix into row-major order."""

from __future__ import annotations

from typing import Any

import torch

from .. import _inductor
from . import cpu
from .library import library

library.define("contiguous(Tensor matrix) -> Tensor")
library.impl("contiguous", lambda matrix: matrix.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::contiguous", lambda matrix: matrix.new_empty(matrix.shape))

contiguous = torch.ops.grass_compile.contiguous.default
"""A copy of a matrix in row-major order. Not a loop of Inductor's: the C++ of a transposition takes long to compile."""

library.define("contiguous_on_cpu(Tensor matrix) -> Tensor")
library.impl("contiguous_on_cpu", cpu.contiguous, "CPU")
torch.library.register_fake("grass_compile::contiguous_on_cpu", lambda matrix: matrix.new_empty(matrix.shape))


@_inductor.lowering(contiguous)
def _lower(matrix: Any) -> Any:
    """An operator of its own; it stands in graphs of a CPU only."""
    return _inductor.fallback(torch.ops.grass_compile.contiguous_on_cpu.default)(matrix)

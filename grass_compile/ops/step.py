"""``step_`` runs the compiled step of one weight inside a backward graph (`grass_compile.passes.kernel` says why it is not
inlined)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _inductor
from .journal import writing
from .library import library

library.define("step_(Tensor gradient, Tensor(a!) weight, Tensor hyper, Tensor selector, Tensor(b!)[] state, str kernel) -> ()")

kernels: dict[str, Callable[..., None]] = {}
"""Compiled steps by name; each takes ``(gradient, weight, hyper, selector, *state)``. Filled by the backend."""


def run_step(gradient: Tensor, weight: Tensor, hyper: Tensor, selector: Tensor, state: Sequence[Tensor], kernel: str) -> None:
    """Run the step by its operators, as ``step_`` does."""
    with writing(weight, "stepped"):
        kernels[kernel](gradient, weight, hyper, selector, *state)


library.impl("step_", run_step, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::step_", lambda *args: None)

step_ = torch.ops.grass_compile.step_.default
"""``step_(gradient [r, n] or [m, r], weight [m, n], hyper, selector, state, kernel)`` moves the weight and its state."""

_inductor.lower_as_write(step_)

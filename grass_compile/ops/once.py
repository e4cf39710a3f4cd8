"""``once`` keeps a compiler from computing a value again wherever it is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _inductor
from .library import library

library.define("once(Tensor value) -> Tensor")
library.impl("once", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::once", torch.empty_like)


def once(value: Tensor) -> Tensor:
    """``value``, computed once rather than for every element that it is broadcast to.

    For what a rule derives from its numbers or from the step counts of rows: inlined in a loop over ``r x n`` elements, an
    ``expm1`` there costs a CPU more than all the rest of the step.
    """
    computed: Tensor = torch.ops.grass_compile.once.default(value)
    return computed


@_inductor.lowering(torch.ops.grass_compile.once.default)
def _lower(value: Any) -> Any:
    """On a CPU, a loop of its own; on a GPU, where a kernel waits for memory anyway, nothing."""
    if value.get_device().type == "cpu":
        _inductor.keep_unfused(value)
    return value

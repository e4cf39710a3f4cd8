"""``anchor`` stands in the joint graph for all that may happen to one weight gradient in the backward.

It ties what that needs to the backward while the partitioner runs, and is replaced afterwards
(`grass_compile.passes.backward.lower_anchors`); it never runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import library, refuse_to_run

library.define(
    "anchor(Tensor gradient, Tensor weight, Tensor hyper, Tensor[] state, Tensor? energy, int[] shape, int number) -> Tensor"
)


def _fake_anchor(
    gradient: Tensor,
    weight: Tensor,
    hyper: Tensor,
    state: Sequence[Tensor],
    energy: Tensor | None,
    shape: Sequence[int],
    number: int,
) -> Tensor:
    return gradient.new_empty(shape, dtype=torch.promote_types(gradient.dtype, torch.float32))


library.impl("anchor", refuse_to_run, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::anchor", _fake_anchor)

anchor = torch.ops.grass_compile.anchor.default
"""``anchor(gradient, weight, hyper, state, energy, shape, number)``; what new rows are proposed by, if they are; the shape of the
compact gradient, the number of the projection."""

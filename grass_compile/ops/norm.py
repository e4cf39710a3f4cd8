"""``norm`` stands, like an anchor, for the common norm of all gradients; it never runs."""

from __future__ import annotations

import torch

from .library import library, refuse_to_run

library.define("norm(Tensor[] anchors, Tensor[] gradients) -> Tensor")
library.impl("norm", refuse_to_run, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::norm", lambda anchors, gradients: anchors[0].new_empty(()))

norm = torch.ops.grass_compile.norm.default
"""``norm(anchors, gradients)``; stands for the common norm of compact and dense gradients, by which all are clipped."""

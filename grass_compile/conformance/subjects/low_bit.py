"""Optimizers whose moments have eight bits or fewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grass_compile.conformance.loop import Loop, trainable
from grass_compile.conformance.subjects.registry import subject

RATE = 1e-2


@subject("bitsandbytes.AdamW8bit", package="bitsandbytes", dtype=torch.float32)
def bitsandbytes_adamw8bit(net: nn.Module) -> Any:
    """Quantized from 4096 elements on, which both matrices have.

    It takes no float64; with torch's ``eps``, one unit of rounding in a gradient becomes 0.4 % of a weight in six steps.
    """
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trainable(net), lr=RATE, eps=1e-4, weight_decay=0.1)


class TorchaoLoop(Loop):
    """torchao compiles the step of each weight; here it runs eagerly, since that takes no minutes and computes the same."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """``optimizer.step()``, not compiled."""
        with torch.compiler.set_stance("force_eager"):
            super().step(closure)


def _torchao(name: str) -> Callable[[nn.Module], Any]:
    def build(net: nn.Module) -> Any:
        import torchao.optim

        return getattr(torchao.optim, name)(trainable(net), lr=RATE, weight_decay=0.1)

    return build


for _name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
    subject(f"torchao.{_name}", package="torchao", loop=TorchaoLoop)(_torchao(_name))

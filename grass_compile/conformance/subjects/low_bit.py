"""Optimizers whose moments have eight bits or fewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grass_compile.conformance.loop import trainable
from grass_compile.conformance.subjects.registry import package, subject

RATE = 1e-2


@subject("bitsandbytes.AdamW8bit", package="bitsandbytes", dtype=torch.float32)
def bitsandbytes_adamw8bit(net: nn.Module) -> Any:
    """Quantized from 4096 elements on, which both matrices have.

    It takes no float64; with torch's ``eps``, one unit of rounding in a gradient becomes 0.4 % of a weight in six steps.
    """
    return package("bitsandbytes").optim.AdamW8bit(trainable(net), lr=RATE, eps=1e-4, weight_decay=0.1)


def _torchao(name: str) -> Callable[[nn.Module], Any]:
    def build(net: nn.Module) -> Any:
        return getattr(package("torchao.optim"), name)(trainable(net), lr=RATE, weight_decay=0.1)

    return build


# torchao compiles the step of each weight. Here it runs eagerly, which computes the same and takes no minutes.
for _name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
    subject(f"torchao.{_name}", package="torchao", stance="force_eager")(_torchao(_name))

"""Optimizers that step inside the backward, or train a block at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from grass_compile.conformance.loop import Loop, NotApplicable, trainable
from grass_compile.conformance.subjects.registry import package, subject


class LomoLoop(Loop):
    """``optimizer.fused_backward(loss, lr)`` is backward and step; nothing is left for ``step()``."""

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """``optimizer.fused_backward(loss, lr)``, with the rate of the group."""
        if retain_graph:
            raise NotApplicable("its fused_backward() keeps no graph")
        self.optimizer.fused_backward(loss, float(self.optimizer.param_groups[0]["lr"]))

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Nothing; the weights have moved."""
        if closure is not None:
            raise NotApplicable("it has no step()")
        self.completed()


NO_STEP = "it has no step(); the rate is an argument of fused_backward()"
LOMO = {"scheduler first": NO_STEP, "rate before step": NO_STEP, "grad scaler": "it has no step()"}


@subject("lomo_optim.Lomo", package="lomo-optim transformers", loop=LomoLoop, not_applicable=LOMO)
def lomo(net: nn.Module) -> Any:
    """SGD without momentum."""
    return package("lomo_optim").Lomo(net, lr=0.1)


@subject("lomo_optim.AdaLomo", package="lomo-optim transformers", loop=LomoLoop, not_applicable=LOMO)
def adalomo(net: nn.Module) -> Any:
    """Adafactor's second moment. It puts its state on a GPU, whatever the model is on; here ``.cuda()`` leaves it where it is."""
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
        return package("lomo_optim").AdaLomo(net, lr=1e-2)


@subject("badam.BlockOptimizer", package="badam transformers")
def badam(net: nn.Module) -> Any:
    """Two blocks, which take turns every four steps.

    At each turn it has Python collect garbage; ``gc.freeze`` keeps that from going through everything that was ever imported.
    """
    gc.freeze()
    base = torch.optim.AdamW(trainable(net), lr=1e-2, weight_decay=0.1)
    blocks = [["body.", "norm."], ["head."]]
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return package("badam").BlockOptimizer(base, named, block_prefix_list=blocks, switch_block_every=4, verbose=0)

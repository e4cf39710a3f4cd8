"""Every optimizer of ``torch.optim`` that trains dense weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grass_compile.conformance.loop import Loop, trainable
from grass_compile.conformance.subjects.registry import subject

RATE = 1e-2
KEYWORDS: dict[str, dict[str, Any]] = {
    "AdamW": dict(weight_decay=0.1),
    "Adam": dict(weight_decay=0.1),
    "SGD": dict(lr=0.1, momentum=0.9),
    "RMSprop": dict(momentum=0.5),
    "Adadelta": dict(lr=1.0),
}
"""Where torch's defaults would leave something untried."""
OWN_FUNCTION = {"LBFGS", "Muon", "SparseAdam"}
"""Registered below, but for ``SparseAdam``, which takes no dense gradients."""


def _of(optimizer: type[torch.optim.Optimizer]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    keywords = {"lr": RATE} | KEYWORDS.get(optimizer.__name__, {})
    return lambda net: optimizer(trainable(net), **keywords)


INITIAL_RATE = "its lr is the size of the first step only"
NOT_APPLICABLE = {
    "Rprop": dict.fromkeys(
        ("scheduler", "scheduler first", "rate before step", "rate of zero", "change then resume"), INITIAL_RATE
    ),
    "ASGD": {"rate of zero": "it computes the size of a step at the end of the one before, as its formula says"},
}

for _name in sorted(set(torch.optim.__all__) - OWN_FUNCTION, key=lambda name: (name not in ("AdamW", "Adam", "SGD"), name)):
    _class = getattr(torch.optim, _name)
    if isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer) and _class is not torch.optim.Optimizer:
        subject(f"torch.optim.{_name}", not_applicable=NOT_APPLICABLE.get(_name, {}))(_of(_class))


@subject("torch.optim.Muon")
def muon(net: nn.Module) -> Any:
    """It trains matrices only; the rest of the model is frozen."""
    for p in net.parameters():
        p.requires_grad_(p.requires_grad and p.dim() == 2)
    return torch.optim.Muon(trainable(net), lr=RATE)


def _aot_eager(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(net, backend="aot_eager")


@subject("torch.optim.AdamW (compiled model)", compile=_aot_eager)
def adamw_compiled(net: nn.Module) -> Any:
    """What torch.compile by itself makes of each loop."""
    return torch.optim.AdamW(trainable(net), lr=RATE, weight_decay=0.1)


class LBFGSLoop(Loop):
    """Its ``step()`` insists on a closure; with one evaluation a step, that is the loss of the last backward."""

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """As usual, and the loss is remembered."""
        super().backward(loss, retain_graph)
        self.last = loss.detach()

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """``optimizer.step(closure)``."""
        super().step(closure or (lambda: self.last))


@subject("torch.optim.LBFGS", loop=LBFGSLoop, not_applicable={"grad scaler": "the scaler takes no closure"})
def lbfgs(net: nn.Module) -> Any:
    """One iteration a step."""
    return torch.optim.LBFGS(trainable(net), lr=0.1, max_iter=1)

"""Optimizers that keep their state for a projection of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grass_compile.conformance.loop import Loop, trainable
from grass_compile.conformance.subjects.registry import package, subject

RATE = 1e-2
RANK = 16
GAP = 4
"""Steps between projections: every sequence has more, so that a lost projection shows."""


SCALES: dict[str, dict[str, Any]] = {
    "galore_torch": dict(scale=0.25),
    "apollo_torch": dict(proj="random", scale_type="channel", scale=1.0),
    "fira": dict(alpha=0.25),
}
"""The keywords of a projected group that differ from package to package."""


def _groups(parameters: Iterable[nn.Parameter], family: str) -> list[dict[str, Any]]:
    parameters = list(parameters)
    others: dict[str, Any] = {"params": [p for p in parameters if p.dim() != 2]}
    matrices: dict[str, Any] = {
        "params": [p for p in parameters if p.dim() == 2],
        "rank": RANK,
        "update_proj_gap": GAP,
        "proj_type": "std",
    }
    return [group for group in (others, matrices | SCALES[family]) if group["params"]]


class LowRankLoop(Loop):
    """A new layer is two groups: its matrices, which are projected, and the rest."""

    def add_group(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """``optimizer.add_param_group``, twice."""
        for group in _groups(parameters.values(), self.subject.name.partition(".")[0]):
            self.optimizer.add_param_group(group)


@subject("galore_torch.GaLoreAdamW", package="galore-torch transformers", loop=LowRankLoop)
def galore(net: nn.Module) -> Any:
    """As in its README."""
    return package("galore_torch").GaLoreAdamW(_groups(trainable(net), "galore_torch"), lr=RATE)


class PerLayer(torch.optim.Optimizer):
    """An optimizer for each weight, which steps as soon as the gradient has been accumulated, as GaLore's scripts do.

    The script's own ``step()`` and ``zero_grad()`` then have nothing to do, as with Transformers' ``LayerWiseDummyOptimizer``.
    """

    def __init__(self, optimizers: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
        super().__init__(list(optimizers), {})
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        for p in optimizers:
            p.register_post_accumulate_grad_hook(self._step)

    def _step(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        self.optimizers[p].step()
        self.optimizers[p].zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing; the weights have moved."""
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of every weight's optimizer."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """A state for each weight."""
        return {str(number): optimizer.state_dict() for number, optimizer in enumerate(self.optimizers.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse."""
        for number, optimizer in enumerate(self.optimizers.values()):
            optimizer.load_state_dict(state_dict[str(number)])


NO_COPY = "its hooks hang on the weights, and a script sets them up anew"


@subject(
    "galore_torch.GaLoreAdamW, per layer",
    package="galore-torch transformers",
    not_applicable={
        "deepcopy": NO_COPY,
        "pickled": NO_COPY,
        "add a group": "a script adds an optimizer and a hook, and no group",
    },
)
def galore_per_layer(net: nn.Module) -> Any:
    """Its "layerwise weight updates"."""
    return PerLayer({p: package("galore_torch").GaLoreAdamW(_groups([p], "galore_torch"), lr=RATE) for p in trainable(net)})


@subject("apollo_torch.APOLLOAdamW", package="apollo-torch transformers", loop=LowRankLoop)
def apollo(net: nn.Module) -> Any:
    """As in its README."""
    return package("apollo_torch").APOLLOAdamW(_groups(trainable(net), "apollo_torch"), lr=RATE)


@subject("fira.FiraAdamW", package="fira transformers", loop=LowRankLoop)
def fira(net: nn.Module) -> Any:
    """As in its README, without ``divide_params``, which prints."""
    return package("fira").FiraAdamW(_groups(trainable(net), "fira"), lr=RATE)

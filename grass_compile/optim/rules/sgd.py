"""SGD with momentum, as ``torch.optim.SGD``, on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...math.rule import Rule


@dataclasses.dataclass(frozen=True)
class SGDRule(Rule):
    """Momentum with dampening, or Nesterov's; weight decay is added to the gradient of the selected rows."""

    momentum: bool = False
    nesterov: bool = False

    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "momentum", "one_minus_dampening", "weight_decay")
    coupled_decay: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
    }

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """A buffer only if there is momentum."""
        return ("momentum_buffer",) if self.momentum else ()

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Straight from the group.

        Raises:
            ConfigError: momentum was switched on after the weights were projected without a buffer for it.
        """
        if float(group["momentum"]) != 0 and not self.momentum:
            raise ConfigError("SGD: momentum was 0 when the weights were projected; set it before the first step.")
        return float(group["lr"]), float(group["momentum"]), 1 - float(group["dampening"]), float(group["weight_decay"])

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``lr * buffer``; the first gradient enters the buffer undampened, as in torch."""
        if not self.momentum:
            return hyper["lr"] * compact_grad, {}
        later = hyper["momentum"] * state["momentum_buffer"] + hyper["one_minus_dampening"] * compact_grad
        buffer = torch.where(state["step"] == 1, compact_grad, later)
        direction = compact_grad + hyper["momentum"] * buffer if self.nesterov else buffer
        return hyper["lr"] * direction, {"momentum_buffer": buffer}

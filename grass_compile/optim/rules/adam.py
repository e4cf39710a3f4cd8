"""Adam with L2 regularisation (Kingma and Ba, arXiv 1412.6980), as ``torch.optim.Adam``, on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from .adamw import AdamWRule


@dataclasses.dataclass(frozen=True)
class AdamRule(AdamWRule):
    """`AdamWRule` whose weight decay is added to the gradient of the selected rows."""

    hyper_names: ClassVar[tuple[str, ...]] = (*AdamWRule.hyper_names, "weight_decay")
    defaults: ClassVar[Mapping[str, Any]] = {**AdamWRule.defaults, "weight_decay": 0.0}
    coupled_decay: ClassVar[bool] = True

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """As for AdamW, and the weight decay."""
        return (*super().hyper(group), float(group["weight_decay"]))

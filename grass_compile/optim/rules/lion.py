"""Lion (Chen et al., arXiv 2302.06675), on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ...math.rule import Rule


@dataclasses.dataclass(frozen=True)
class LionRule(Rule):
    """The sign of an interpolated momentum; one moment."""

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg",)
    by_parts: ClassVar[bool] = True
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2")
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """``1 - beta`` comes from the host, where it does not lose digits."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return float(group["lr"]), beta1, beta2, 1 - beta1, 1 - beta2

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 2 of the paper; the decoupled weight decay is applied outside."""
        exp_avg = state["exp_avg"]
        direction = hyper["beta1"] * exp_avg + hyper["one_minus_beta1"] * compact_grad
        exp_avg = hyper["beta2"] * exp_avg + hyper["one_minus_beta2"] * compact_grad
        return hyper["lr"] * direction.sign(), {"exp_avg": exp_avg}

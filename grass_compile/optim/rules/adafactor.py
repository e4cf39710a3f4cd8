"""Adafactor (Shazeer and Stern, arXiv 1804.04235), as ``torch.optim.Adafactor``, on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...math.rule import Rule, StateLayout
from ...ops.once import once


@dataclasses.dataclass(frozen=True)
class AdafactorRule(Rule):
    """The second moment as the outer product of row and column means; no first moment.

    The size of the step follows the root mean square of the weight, here of its selected rows, and of the update.
    """

    state_names: ClassVar[tuple[str, ...]] = ("row_var", "col_var")
    state_layout: ClassVar[Mapping[str, StateLayout]] = {"row_var": "selected", "col_var": "others"}
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "beta2_decay", "eps1", "eps2", "d")
    defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-2,
        "beta2_decay": -0.8,
        "eps": (None, 1e-3),
        "d": 1.0,
        "weight_decay": 0.0,
    }
    reads_weight: ClassVar[bool] = True

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The machine epsilon of fp32 where ``eps[0]`` is None."""
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(torch.float32).eps if eps1 is None else eps1
        return float(group["lr"]), float(group["beta2_decay"]), float(eps1), float(eps2), float(group["d"])

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithms 4 and 5 of the paper, in torch's order of operations."""
        step = state["step"].to(compact_grad.dtype)
        fresh = step ** hyper["beta2_decay"]  # 1 - beta2
        squares = compact_grad * compact_grad
        row_var = state["row_var"] + fresh * (squares.mean(1, keepdim=True) - state["row_var"])
        others = fresh.mean() if fresh.dim() else fresh
        col_var = state["col_var"] + others * (squares.mean(0, keepdim=True) - state["col_var"])
        variance = row_var * col_var / row_var.mean().clamp(min=hyper["eps1"])
        update = compact_grad * variance.clamp(min=hyper["eps1"] ** 2).rsqrt()
        rms = (update * update).mean().sqrt()
        size = (state["weight"] * state["weight"]).mean().sqrt()
        rho = torch.minimum(hyper["lr"], step.rsqrt())
        alpha = once(torch.maximum(hyper["eps2"], size) * rho / (rms / hyper["d"]).clamp(min=1.0))
        return alpha * update, {"row_var": row_var, "col_var": col_var}

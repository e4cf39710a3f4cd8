"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in ``torch.optim.AdamW``, on a compact gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...math.rule import Rule
from ...ops.once import once


@dataclasses.dataclass(frozen=True)
class AdamWRule(Rule):
    """Bias-corrected first and second moments; the decoupled weight decay is applied outside, on the whole weight."""

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    by_parts: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    hyper_names: ClassVar[tuple[str, ...]] = (
        "lr",
        "beta1",
        "beta2",
        "one_minus_beta1",
        "one_minus_beta2",
        "log_beta1",
        "log_beta2",
        "eps",
    )

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """``1 - beta`` and ``log(beta)`` come from the host, where they do not lose digits."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
        return (float(group["lr"]), beta1, beta2, 1 - beta1, 1 - beta2, *logs, float(group["eps"]))

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``lr * m_hat / (sqrt(v_hat) + eps)``; ``1 - beta**step`` as ``-expm1(step * log(beta))``, exact for small steps.

        Written as ``b * m + (1 - b) * g``: Inductor drops ``alpha`` of an add whose operand is a matmul (torch 2.13).
        """
        exp_avg = hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * compact_grad
        exp_avg_sq = hyper["beta2"] * state["exp_avg_sq"] + hyper["one_minus_beta2"] * (compact_grad * compact_grad)
        bias_correction1 = -torch.expm1(state["step"] * hyper["log_beta1"])
        bias_correction2 = -torch.expm1(state["step"] * hyper["log_beta2"])
        step_size, root = once(torch.stack((hyper["lr"] / bias_correction1, bias_correction2.sqrt()))).unbind()
        denominator = exp_avg_sq.sqrt() / root + hyper["eps"]
        return step_size * (exp_avg / denominator), {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), as in ``torch.optim.Muon``, on a compact gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import _aot
from ...distributed.collectives import summed
from ...math.rule import Rule


@dataclasses.dataclass(frozen=True)
class MuonRule(Rule):
    """The momentum with all its singular values brought near 1: one moment, and no second.

    The selected rows are orthogonalized as if they were the whole weight. The update's root mean square is about ``0.2 lr``,
    Adam's in the long run (arXiv 2502.16982; ``adjust_lr_fn="match_rms_adamw"`` of ``torch.optim.Muon``), so that rates of AdamW
    are near those of this rule. The decoupled weight decay is applied outside, on the whole weight.

    Attributes:
        nesterov: whether the momentum looks ahead by one gradient.
        ns_steps: how many Newton-Schulz iterations.
        coefficients: of the Newton-Schulz polynomial.
        eps: the least norm that the momentum is divided by.
        dtype: of the iterations; None stands for `iteration_dtype`.
        parts: where each rank owns a part of the rows' numbers, the names of the process groups and how many numbers a row has in
            all; None where they are all here.
    """

    nesterov: bool = True
    ns_steps: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    dtype: torch.dtype | None = None
    parts: tuple[tuple[str, ...], int] | None = None

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "momentum", "one_minus_momentum")
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1}

    @property
    def elementwise(self) -> bool:
        """All numbers have to do with each other, although the state's layout does not show it."""
        return False

    def over_parts(self, groups: tuple[str, ...], length: int) -> MuonRule:
        """The same, by `orthogonalize_parts`."""
        return dataclasses.replace(self, parts=(groups, length))

    @property
    def exchanges(self) -> bool:
        """Of a weight of which each rank owns a part, the products of its rows are added up over the ranks."""
        return self.parts is not None

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """``1 - momentum`` comes from the host, where it does not lose digits."""
        momentum = float(group["momentum"])
        return float(group["lr"]), momentum, 1 - momentum

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``0.2 lr sqrt(max(r, n)) orthogonalize(momentum)``."""
        momentum, rest = hyper["momentum"], hyper["one_minus_momentum"]
        buffer = momentum * state["momentum_buffer"] + rest * compact_grad
        ahead = momentum * buffer + rest * compact_grad if self.nesterov else buffer
        how = self.ns_steps, self.coefficients, self.eps
        if self.parts is not None:
            update, length = orthogonalize_parts(ahead, self.parts[0], *how), self.parts[1]
        else:
            dtype = self.dtype or iteration_dtype(compact_grad.device)
            update, length = orthogonalize(ahead.to(dtype), *how).to(compact_grad.dtype), compact_grad.shape[1]
        return 0.2 * math.sqrt(max(compact_grad.shape[0], length)) * hyper["lr"] * update, {"momentum_buffer": buffer}


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bf16, as in ``torch.optim.Muon``; fp32 on a CPU without instructions for it, where bf16 takes some twenty times as long."""
    return torch.bfloat16 if device.type != "cpu" or _aot.cpu_has_bf16() else torch.float32


def orthogonalize(
    matrix: Tensor, steps: int, coefficients: tuple[float, float, float] = MuonRule.coefficients, eps: float = MuonRule.eps
) -> Tensor:
    """``U V^T`` of ``matrix = U S V^T``, nearly: the singular values end between about 0.7 and 1.2, but for the smallest.

    Args:
        matrix: ``[r, n]``.
        steps: of the quintic Newton-Schulz iteration; five do.
        coefficients: its polynomial, by default that of Jordan et al.
        eps: the least norm that the matrix is divided by.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    wide = wide / wide.norm().clamp(min=eps)
    if is_by_gram(wide):
        wide = orthogonalize_parts(wide, (), steps, coefficients, eps)
    else:
        a, b, c = coefficients
        for _ in range(steps):
            gram = wide @ wide.t()
            wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.t()


def is_by_gram(wide: Tensor) -> bool:
    """Whether it is less work to iterate on ``X X^T`` than on ``X``, ``[r, n]``: with five steps, ``4 r^2 n + 34 r^3`` operations
    rather than ``20 r^2 n + 10 r^3``. Not in bf16, whose eight bits are too few for it."""
    return wide.dtype != torch.bfloat16 and 2 * wide.shape[1] > 3 * wide.shape[0]


def orthogonalize_parts(
    part: Tensor,
    groups: tuple[str, ...],
    steps: int,
    coefficients: tuple[float, float, float] = MuonRule.coefficients,
    eps: float = MuonRule.eps,
) -> Tensor:
    """The part of `orthogonalize` that belongs to a part of the columns of a matrix, of which each rank has one.

    The iteration multiplies the matrix ``X`` by polynomials of ``X X^T`` alone. That is a sum over the parts, ``r x r``: it is
    added up over the ranks once, and all of them iterate the product of the polynomials, in the dtype of the matrix.

    Args:
        part: ``[r, n / ranks]``.
        groups: the names of the process groups over which it is in parts; none if this is all of it.
        steps: as there.
        coefficients: as there.
        eps: as there.
    """
    gram = summed(part @ part.t(), groups)
    norm = gram.diagonal().sum().sqrt().clamp(min=eps)
    gram = gram / (norm * norm)
    a, b, c = coefficients
    one = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor = None
    for step in range(steps):
        polynomial = torch.addmm(a * one + b * gram, gram, gram, alpha=c)
        factor = polynomial if factor is None else polynomial @ factor
        if step + 1 < steps:
            gram = polynomial @ gram @ polynomial
    return ((one if factor is None else factor) / norm) @ part

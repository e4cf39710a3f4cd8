"""SONew, the tridiagonal sparsified online Newton method (Devvrit et al., arXiv 2311.10085), on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...math.rule import Rule


@dataclasses.dataclass(frozen=True)
class SONewRule(Rule):
    """A preconditioner whose inverse is fitted to the tridiagonal part of ``E[g g^T]`` of each selected row.

    With ``h`` the diagonal and ``o`` the off-diagonal of that average, the preconditioner is ``L D L^T`` with unit lower
    bidiagonal
    ``L``, ``L[j+1, j] = -o_j / h_{j+1}``, and ``1 / D_j = h_j - o_j^2 / h_{j+1}`` (``1 / D_n = h_n``), Theorem 3.1 of the
    paper. Edges whose
    ``1 / D_j`` is not above ``gamma h_j`` are left out, as in its Algorithm 3. The step is grafted: its direction is the
    preconditioner's, its norm, row by row, that of Adam's step.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "diagonal", "off_diagonal")
    hyper_names: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "eps", "gamma")
    defaults: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "gamma": 1e-4,
        "weight_decay": 0.0,
    }

    @property
    def elementwise(self) -> bool:
        """No: neighbours in a row belong together, so it wants rows whichever the axis."""
        return False

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """``1 - beta`` comes from the host, where it does not lose digits."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return float(group["lr"]), beta1, beta2, 1 - beta1, 1 - beta2, float(group["eps"]), float(group["gamma"])

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Averages, direction, and the norm of Adam's step (its bias corrections included)."""
        step = state["step"].to(compact_grad.dtype)
        exp_avg = hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * compact_grad
        diagonal = hyper["beta2"] * state["diagonal"] + hyper["one_minus_beta2"] * compact_grad * compact_grad
        neighbours = compact_grad * _next(compact_grad)
        off_diagonal = hyper["beta2"] * state["off_diagonal"] + hyper["one_minus_beta2"] * neighbours
        correction1, correction2 = 1 - hyper["beta1"] ** step, 1 - hyper["beta2"] ** step
        mean = exp_avg / correction1
        direction = precondition(mean, diagonal / correction2, off_diagonal / correction2, hyper["eps"], hyper["gamma"])
        adam = mean / ((diagonal / correction2).sqrt() + hyper["eps"])
        size = adam.square().sum(1, keepdim=True).sqrt()
        norm = direction.square().sum(1, keepdim=True).sqrt()
        new = {"exp_avg": exp_avg, "diagonal": diagonal, "off_diagonal": off_diagonal}
        return hyper["lr"] * direction * (size / (norm + 1e-30)), new


def precondition(vector: Tensor, diagonal: Tensor, off_diagonal: Tensor, eps: Any, gamma: Any) -> Tensor:
    """``L D L^T vector`` row by row.

    Args:
        vector: ``[r, n]``.
        diagonal: ``[r, n]``.
        off_diagonal: ``[r, n]``; its last column is zero.
        eps: added to the diagonal.
        gamma: edges whose conditional variance is not above this share of the diagonal are left out.
    """
    diagonal = diagonal + eps
    following = torch.cat((diagonal[:, 1:], torch.ones_like(diagonal[:, :1])), dim=1)
    reduced = diagonal - off_diagonal.square() / following
    kept = reduced > gamma * diagonal
    reduced = torch.where(kept, reduced, diagonal)
    below = torch.where(kept, -off_diagonal / following, 0.0)  # L[j + 1, j]
    inner = (vector + below * _next(vector)) / reduced
    shifted = torch.cat((torch.zeros_like(inner[:, :1]), (below * inner)[:, :-1]), dim=1)
    return inner + shifted


def _next(tensor: Tensor) -> Tensor:
    """Each element's right neighbour; zero past the end."""
    return torch.cat((tensor[:, 1:], torch.zeros_like(tensor[:, :1])), dim=1)

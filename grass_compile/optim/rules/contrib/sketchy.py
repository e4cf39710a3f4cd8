"""Sketchy (Feinberg et al., arXiv 2302.03764): a preconditioner from a Frequent Directions sketch, on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....math.rule import StateLayout
from ..adamw import AdamWRule


@dataclasses.dataclass(frozen=True)
class SketchyRule(AdamWRule):
    """``(S + rho I)^(-1/2)`` along the features, with ``S`` of rank ``size``, in place of Adam's element by element root.

    The selected rows are the samples of one preconditioner for their features, ``[n, n]``, which is never formed: the paper's
    S-AdaGrad with exponentially weighted Frequent Directions (Algorithms 1 and 2), or its S-Shampoo on one side. With
    ``lambda_1 >= lambda_2 >= ...`` the eigenvalues and ``u_i`` the eigenvectors of ``beta2 S + C^T C``::

        rho    = beta2 rho + lambda_(size + 1)
        S      = sum over i <= size of (lambda_i - lambda_(size + 1)) u_i u_i^T
        update = lr m_hat ((S + rho I) / total)^(-1/2)

    where ``m_hat`` is Adam's bias-corrected first moment and ``total = beta2 total + 1`` what all ``C^T C`` in ``S`` weigh, so
    that steps do not shrink with time: the largest singular value of an update is about ``lr``. Directions in which nothing was
    ever seen have no inverse and get zero.

    The eigenvectors come from the ``(size + r) x (size + r)`` matrix of products of what is kept and what is new, in double
    precision since it holds squares, by LAPACK or cuSOLVER: it is a call between compiled loops, which CUDA graphs cannot hold.

    Attributes:
        size: of the sketch, the paper's l; at most the number of features.
    """

    size: int = 16

    defaults: ClassVar[Mapping[str, Any]] = {**AdamWRule.defaults, "weight_decay": 0.0}
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "sketch", "escaped", "total")
    state_layout: ClassVar[Mapping[str, StateLayout]] = {"sketch": "others", "escaped": "whole", "total": "whole"}

    def width(self, name: str, features: int) -> int | None:
        """The sketch has ``size`` numbers for each feature."""
        return min(self.size, features) if name == "sketch" else None

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sketch is kept as ``B [size, n]`` with ``S = B^T B``, whose rows are orthogonal."""
        dtype, beta2 = compact_grad.dtype, hyper["beta2"].double()
        exp_avg = hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * compact_grad
        mean = exp_avg / -torch.expm1(state["step"] * hyper["log_beta1"])
        stacked = torch.cat((beta2.sqrt() * state["sketch"].double(), compact_grad.double()))
        values, directions, cutoff, noise = leading(stacked, state["sketch"].shape[0])
        kept = (values - cutoff).clamp(min=0.0)
        escaped = beta2 * state["escaped"].double() + cutoff
        total = beta2 * state["total"].double() + 1.0

        def inverse_root(eigenvalues: Tensor) -> Tensor:
            root = 1.0 / ((eigenvalues / total).sqrt() + hyper["eps"])
            return torch.where(eigenvalues > noise, root, 0.0)

        outside = inverse_root(escaped)
        inside = inverse_root(kept.unsqueeze(0) + escaped) - outside
        mean = mean.double()
        update = outside * mean + (mean @ directions.t() * inside) @ directions
        new = {"sketch": kept.sqrt().unsqueeze(1) * directions, "escaped": escaped, "total": total}
        return (hyper["lr"] * update).to(dtype), {"exp_avg": exp_avg, **{name: new[name].to(dtype) for name in new}}


def leading(stacked: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest eigenvalues of ``stacked^T stacked``.

    Args:
        stacked: ``[rows, n]``, fp64.
        count: how many; at most n, and less than the rows.

    Returns:
        The eigenvalues ``[count]``; their eigenvectors ``[count, n]``, zero where the eigenvalue is mere noise; the eigenvalue
        that comes next, 0-d; and the bound below which an eigenvalue is noise. Noise is returned as zero.
    """
    rows, features = stacked.shape
    product = stacked @ stacked.t() if rows <= features else stacked.t() @ stacked
    values, vectors = torch.linalg.eigh(product)
    noise = 1e-12 * values[-1]
    values = torch.where(values > noise, values, 0.0)
    cutoff = values[-count - 1] if values.shape[0] > count else torch.zeros_like(noise)
    values, vectors = values[-count:], vectors[:, -count:].t()
    if rows <= features:
        scale = torch.where(values > 0, values.rsqrt(), 0.0)
        vectors = scale.unsqueeze(1) * (vectors @ stacked)
    return values, vectors, cutoff, noise

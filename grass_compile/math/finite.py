"""Which gradients are finite, and clipping that leaves out those that are not.

A gradient is finite if its norm is: no element is infinite or NaN, or so large (1.8e19 in fp32) that its square, which Adam's
second moment would keep, overflows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.layout import is_sharded


def is_finite(gradient: Tensor) -> Tensor:
    """Whether the norm of a gradient (or of the norms of its rows) is finite; ``bool``, 0-d, on its device."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return (wide * wide).sum().isfinite()


def not_finite(gradients: Sequence[Tensor]) -> Tensor:
    """Which gradients are not finite; ``bool``, one number for each, on the device of the first."""
    if not gradients:
        return torch.zeros(0, dtype=torch.bool, device="cpu")
    return _norms(gradients, 2.0).isfinite().logical_not()


def clip_(gradients: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Scale gradients in place so that their common norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``, but for
    those whose norm is not finite: they count for nothing, and become NaN throughout.

    Returns:
        The norm before, of the others; 0-d, without a synchronisation.
    """
    if not gradients:
        return torch.zeros((), device="cpu")
    norms = _norms(gradients, norm_type)
    finite = norms.isfinite()
    norm: Tensor = torch.linalg.vector_norm(torch.where(finite, norms, 0.0 if norm_type >= 0 else torch.inf), norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factors = torch.where(finite & norm.isfinite(), scale, torch.nan)
    for gradient, factor in zip(gradients, factors.unbind(), strict=True):
        gradient.mul_(factor.to(gradient.device))
    return norm


def total_norm(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """The common norm of gradients, as ``torch.nn.utils.get_total_norm``; of a mixture of ``DTensor`` and others, too."""
    if not any(map(is_sharded, gradients)):
        return torch.nn.utils.get_total_norm(gradients, norm_type)
    return torch.linalg.vector_norm(_norms(gradients, norm_type), norm_type)  # type: ignore[no-any-return]


def _norms(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of each, in at least fp32, on the device of the first."""
    dtypes = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    return torch.stack([norm.to(norms[0].device) for norm in norms])

"""The rules that choose the rows (columns) of a weight that move until the next refresh."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(gradient: Tensor, dim: int) -> Tensor:
    """Norms of the rows (``dim=0``) or columns (``dim=1``) of a full gradient, in at least fp32."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1 - dim, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norms


def top(scores: Tensor, rank: int) -> Tensor:
    """The ``rank`` rows of largest score, ``int64[rank]``, ascending so that the gather walks forward through memory."""
    return torch.topk(scores, rank, sorted=False).indices.sort().values

"""The rules that choose the rows (columns) of a weight that move until the next refresh.

Each is a function of scores, noise and the rank. ``top`` takes the largest scores. The others draw ``r`` distinct rows one after
another with probabilities proportional to a weight: the norm (``norm``), its square (``norm2``) or one (``uniform``), those drawn
already left out. That is what the ``r`` largest of ``log(weight) + Gumbel noise`` are (Gumbel-top-k: Vieira 2014; Kool et al.,
arXiv 1903.06059). Except for ``uniform``, whose rows are all included with probability ``r/m``, no weights are known that
would make the sum of what is drawn unbiased, and none are applied: ``row_scale`` is one.

With replacement, ``r`` rows are drawn independently of each other with probabilities ``q``. A row that is drawn is scaled by
``rho = 1 / sqrt(r q)`` before the update rule and again after it, once for each time it was drawn, which makes what a linear rule
adds up unbiased: ``E[sum rho^2 G_i e_i] = G``, with the variance ``(sum |G_i|^2 / q_i - |G|^2) / r``. A row drawn several
times takes one slot and a count; slots that are left hold other rows, at scale zero.

Scores may hold zeros, infinities and NaN: ``r`` distinct rows are returned all the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .transfer import to_device

DRAWN_BY_SCORE = ("norm", "norm2")
"""The selections that draw by scores."""

SAMPLED = (*DRAWN_BY_SCORE, "uniform")
"""The selections that draw."""


def scores(gradient: Tensor, dim: int) -> Tensor:
    """Norms of the rows (``dim=0``) or columns (``dim=1``) of a full gradient, in at least fp32."""
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1 - dim, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norms


def top(scores: Tensor, rank: int) -> Tensor:
    """The ``rank`` rows of largest score, ``int64[rank]``, ascending so that the gather walks forward through memory."""
    return torch.topk(scores, rank, sorted=False).indices.sort().values


def keys(selection: str, scores: Tensor, noise: Tensor) -> Tensor:
    """What a sampled selection takes the ``r`` largest of: ``log(weight) + Gumbel``.

    Args:
        selection: one of `SAMPLED`.
        scores: ``[m]``.
        noise: ``[m]``, uniform in (0, 1).
    """
    gumbel = -torch.log(-torch.log(noise))
    if selection == "uniform":
        return gumbel
    return scores.log() * (2.0 if selection == "norm2" else 1.0) + gumbel


def select(selection: str, scores: Tensor, noise: Tensor | None, rank: int, block: int = 1) -> Tensor:
    """Choose rows.

    Args:
        selection: ``top`` or one of `SAMPLED`.
        scores: ``[m]``, norms of the rows.
        noise: ``[m]``, uniform in (0, 1), of which the first ``m / block`` are used; None for ``top``.
        rank: how many, a multiple of ``block``.
        block: neighbouring rows that are chosen together, by the norm of all of them; divides ``m``.

    Returns:
        ``int64[rank]``, distinct, ascending.
    """
    if block > 1:
        scores = torch.linalg.vector_norm(scores.unflatten(0, (-1, block)), dim=1)
    if selection != "top":
        assert noise is not None
        scores = keys(selection, scores, noise[: scores.shape[0]].to(scores.dtype))
    rows = top(scores, rank // block)
    if block > 1:
        rows = (rows.unsqueeze(1) * block + torch.arange(block, device=rows.device)).flatten()
    return rows


def draw(selection: str, scores: Tensor, noise: Tensor, rank: int, block: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows with replacement.

    Args:
        selection: one of `SAMPLED`.
        scores: ``[m]``, norms of the rows.
        noise: ``[m]``, uniform in (0, 1), of which the first ``rank / block`` are used.
        rank: how many draws, a multiple of ``block``.
        block: neighbouring rows that are drawn together.

    Returns:
        ``int64[rank]``, distinct, ascending; the row scale ``rho`` of each, zero for rows that were not drawn; and how often each
        was drawn.
    """
    if block > 1:
        scores = torch.linalg.vector_norm(scores.unflatten(0, (-1, block)), dim=1)
    draws = rank // block
    weights = torch.ones_like(scores) if selection == "uniform" else scores.nan_to_num(posinf=0.0).to(torch.float64)
    weights = (weights / weights.max().clamp(min=torch.finfo(torch.float32).tiny)) ** (2 if selection == "norm2" else 1)
    weights = torch.where(weights.sum() > 0, weights, 1.0)
    probabilities = weights / weights.sum()
    drawn = torch.searchsorted(probabilities.cumsum(0), noise[:draws].to(probabilities.dtype)).clamp(max=len(scores) - 1)
    counts = torch.zeros_like(scores).index_add_(0, drawn, torch.ones_like(scores[:draws]))
    rows = torch.topk(counts, draws, sorted=False).indices.sort().values
    count = counts[rows]
    scale = torch.where(count > 0, (draws * probabilities[rows]).rsqrt().to(scores.dtype), 0.0)
    if block > 1:
        rows = (rows.unsqueeze(1) * block + torch.arange(block, device=rows.device)).flatten()
        scale, count = scale.repeat_interleave(block), count.repeat_interleave(block)
    return rows, scale, count


def fill_with_noise(noise: Tensor, seed: int, number: int, updates: int) -> None:
    """Draw the noise of one refresh, in place: the same on every device, every rank and after every resume.

    Args:
        noise: ``[m]``.
        seed: the optimizer's.
        number: which of its parameters.
        updates: how many updates that has had.
    """
    digest = hashlib.sha256(f"{seed} {number} {updates}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    drawn = torch.rand(noise.shape, generator=generator, dtype=torch.float64, device="cpu")
    drawn.clamp_(1e-12, 1 - 2**-24)  # below 1 in fp32 too
    noise.copy_(to_device(drawn.to(noise.dtype), noise.device))

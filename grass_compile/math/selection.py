"""The rules that choose the rows (columns) of a weight that move until the next refresh.

Each is a function of scores, noise and the rank. ``top`` takes the largest scores. The others draw ``r`` distinct rows one after
another with probabilities proportional to a weight: the norm (``norm``) or one (``uniform``), those drawn already left out. The
``r`` largest of ``log(weight) + Gumbel noise`` are such a draw (Gumbel-top-k: Vieira 2014; Kool et al., arXiv 1903.06059).
``uniform`` includes every row with probability ``r/m``. For ``norm`` no weights are known that would make the sum of the drawn
rows unbiased. No weights are applied: ``row_scale`` is one.

``uniform/8`` and the like choose blocks of 8 neighbours in the same way, by the norm of each block: memory moves whole sectors,
so that a GPU that is to read one column of a row-major matrix reads its neighbours too.

Scores may hold zeros, infinities and NaN: ``r`` distinct rows are returned all the same.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from .transfer import to_device

DRAWN_BY_SCORE = ("norm",)
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
    """The keys of a sampled selection, ``log(weight) + Gumbel``; it takes the ``r`` largest.

    Args:
        selection: one of `SAMPLED`.
        scores: ``[m]``.
        noise: ``[m]``, uniform in (0, 1).
    """
    gumbel = -torch.log(-torch.log(noise))
    if selection == "uniform":
        return gumbel
    return scores.log() + gumbel


def select(selection: str, scores: Tensor, noise: Tensor | None, rank: int) -> Tensor:
    """Choose rows.

    Args:
        selection: ``top`` or one of `SAMPLED`; or with a block, ``top/8``, which is smaller where it would not divide the rank
            and the number of rows.
        scores: ``[m]``, norms of the rows.
        noise: ``[m]``, uniform in (0, 1); None for ``top``.
        rank: how many.

    Returns:
        ``int64[rank]``, distinct, ascending.
    """
    selection, _, asked = selection.partition("/")
    block = math.gcd(int(asked or 1), rank, len(scores))
    if block > 1:
        scores = torch.linalg.vector_norm(scores.view(-1, block), dim=1)
        noise = noise[::block] if noise is not None else None
    if selection != "top":
        assert noise is not None
        scores = keys(selection, scores, noise.to(scores.dtype))
    chosen = top(scores, rank // block)
    return chosen if block == 1 else (block * chosen[:, None] + torch.arange(block, device=chosen.device)).flatten()


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

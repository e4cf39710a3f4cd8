"""Numbers as they travel: 32, 16, 8 or 4 bits each.

32 bits are fp32 and 16 bits bf16. The others have a scale, the largest magnitude, for each block of 128 numbers: 8 bits are whole
numbers from -127 to 127, 4 bits are `E2M1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (32, 16, 8, 4)
BLOCK = 128
"""Numbers that share a scale. Its four bytes make a quarter of a bit for each."""

E2M1 = tuple(level / 12 for level in (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12))
"""4 bits: a sign, two of exponent and one of mantissa, as in the OCP's MXFP4, over the largest. Rounding to them changes normal
numbers by 0.11 of their norm and those of Student's t with three degrees of freedom by 0.15; E3M0, which Streaming DiLoCo (arXiv
2501.18512) takes, by 0.19 and 0.17, and whole numbers up to 7 by 0.12 and 0.22."""


def encode(vectors: Tensor, bits: int) -> Tensor:
    """The bytes of some vectors.

    Args:
        vectors: ``fp32[k, n]``, ``n`` a multiple of `BLOCK`.
        bits: of `BITS`.

    Returns:
        ``uint8[k, size]``; scales come first. A number that is not finite makes NaN of its block.
    """
    if bits >= 16:
        return vectors.to(torch.float32 if bits == 32 else torch.bfloat16).contiguous().view(torch.uint8)
    blocks = vectors.unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(2)
    unit = (blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(2)).flatten(1)
    codes = _whole(unit) if bits == 8 else _packed(unit)
    return torch.cat([scales.view(torch.uint8), codes], 1)


def decode(encoded: Tensor, bits: int) -> Tensor:
    """The numbers of ``encode``'s bytes, ``fp32[k, n]``."""
    if bits >= 16:
        numbers: Tensor = encoded.view(torch.float32 if bits == 32 else torch.bfloat16)
        return numbers.float()
    blocks = encoded.shape[1] // (4 + BLOCK * bits // 8)
    scales, codes = encoded[:, : 4 * blocks].contiguous().view(torch.float32), encoded[:, 4 * blocks :]
    unit = codes.float().sub_(127).div_(127) if bits == 8 else _unpacked(codes)
    numbers = unit.unflatten(1, (-1, BLOCK)) * scales.unsqueeze(2)
    return numbers.flatten(1)


def _whole(unit: Tensor) -> Tensor:
    """Numbers of [-1, 1] in steps of 1/127, from 0 to 254."""
    return (unit.nan_to_num(0.0) * 127).round_().add_(127).to(torch.uint8)


def _packed(unit: Tensor) -> Tensor:
    """Numbers of [-1, 1] as the nearest levels, two in a byte."""
    levels = unit.new_tensor(E2M1)
    codes = torch.bucketize(unit.nan_to_num(0.0), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _unpacked(codes: Tensor) -> Tensor:
    """The levels of what `_packed` made."""
    levels = torch.tensor(E2M1, device=codes.device)
    return levels[torch.stack([codes & 15, codes >> 4], 2).flatten(1).int()]

"""Random numbers as a function of position and key, in whole numbers, so that every compiler and device draws the same.

The mixing steps are those of a 32-bit finalizer (multiply, shift, xor), in int64 with multipliers of at most 31 bits, so that
nothing overflows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def rounding_noise(shape: Sequence[int], seed: Tensor, first: int = 0) -> Tensor:
    """Uniform whole numbers of 16 bits, ``int32``, a function of ``seed`` and position alone.

    Args:
        shape: of the result.
        seed: 0-d, a whole number below ``2**24``.
        first: how many rows (of a taller tensor) come before these.
    """
    position = _positions(shape, first, seed.device)
    mixed = _mix((position * 0x3C6EF35F + seed.to(torch.int64) * 0x5851F42D) & _MASK)
    return (mixed & 0xFFFF).to(torch.int32)


def gaussian(key: Tensor, length: int, rank: int, dtype: torch.dtype) -> Tensor:
    """A matrix ``P``, ``[length, rank]``, of independent normal numbers of variance ``1 / rank``, so that ``E[P P^T]`` is one.

    Box and Muller's transformation, in float64: what compilers and devices differ by in its functions is below the last bit of
    what is returned.

    Args:
        key: ``int64[2]``, whole numbers below ``2**31``; see `new_key`.
        length: number of rows.
        rank: number of columns.
        dtype: of the result.
    """
    position = _positions((length, rank), 0, key.device)
    word = _mix((position * 0x3C6EF35F + key[0] * 0x5851F42D) & _MASK)
    radius, angle = (_mix((word ^ key[1]) + offset & _MASK) for offset in (0x1B873593, 0x5BD1E995))
    uniform = (radius.to(torch.float64) + 0.5) * 2.0**-32
    turn = angle.to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return ((uniform.log() * (-2.0 / rank)).sqrt() * turn.cos()).to(dtype)


def new_key(seed: int, number: int, updates: int) -> Tensor:
    """The key of one refresh of one weight, ``int64[2]``: the same on every device and rank and after every resume.

    Args:
        seed: the optimizer's.
        number: which of its parameters.
        updates: how many updates that has had.
    """
    digest = hashlib.sha256(f"gaussian {seed} {number} {updates}".encode()).digest()
    return torch.tensor([int.from_bytes(digest[at : at + 4], "little") >> 1 for at in (0, 4)], device="cpu")


def _positions(shape: Sequence[int], first: int, device: torch.device) -> Tensor:
    """The number of each element in row-major order, ``int64``, counted from row ``first``."""
    position = torch.zeros(shape, dtype=torch.int64, device=device)
    for dim, size in enumerate(shape):
        numbers = torch.arange(size, device=device) + (0 if dim else first)
        position = position * size + numbers.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return position


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words (in int64) in which every bit of the input changes about half of the output's."""
    for multiplier in (0x45D9F3B, 0x2C1B3C6D):
        word = ((word ^ (word >> 16)) * multiplier) & _MASK
    return word ^ (word >> 15)

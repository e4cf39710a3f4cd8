"""AdamW with moments of 8 bits, quantised block by block (Dettmers et al., arXiv 2110.02861), on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ... import _aot
from ...math.rule import StateLayout
from .adamw import AdamWRule


@dataclasses.dataclass(frozen=True)
class AdamW8bitRule(AdamWRule):
    """`AdamWRule` between two conversions: the moments are kept as codes of one byte, and of every block of ``block_size``
    neighbouring features of a selected row as the largest magnitude, ``[r, ceil(n / block_size)]``.

    A code ``c`` stands for a power of ``c``, so that the arithmetic is that of a few roots and products and needs no table::

        exp_avg    = largest * sign(c) * (|c| / 127)^4      c = -127 ... 127
        exp_avg_sq = largest * (c / 255)^8                  c =    0 ... 255, 0 for zero alone

    A first moment gets the code of the nearest value, a second moment that of the nearest eighth root. Let ``s`` be the share of
    a moment, or of the root of a second moment, since it is this that divides, in the largest of its block. The relative error of
    shares from ``s`` on is at most

    ====================  =====  =====  =====  =====
    ``s``                     1   0.01  0.001   1e-4
    ====================  =====  =====  =====  =====
    ``exp_avg``           1.6 %  5.0 %  8.5 %   15 %
    ``sqrt(exp_avg_sq)``  0.8 %  2.5 %  4.5 %  8.1 %
    ====================  =====  =====  =====  =====

    No first moment more than doubles, and shares below ``1.9e-9`` become zero. A second moment that is not zero never does: the
    smallest share of a root is ``2.4e-10``, and what is below gets that, so that a step becomes too short rather than too long.
    One moment that is not finite makes its block NaN.

    Attributes:
        block_size: features that share a largest magnitude; need not divide their number.
    """

    block_size: int = 128

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_max", "exp_avg_sq", "exp_avg_sq_max")
    state_layout: ClassVar[Mapping[str, StateLayout]] = {"exp_avg_max": "selected", "exp_avg_sq_max": "selected"}
    state_dtypes: ClassVar[Mapping[str, torch.dtype]] = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}

    def width(self, name: str, features: int) -> int | None:
        """The number of blocks."""
        return -(-features // self.block_size) if name in self.state_layout else None

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AdamW's update from the new moments as they are before they are quantised."""
        features = compact_grad.shape[1]
        moments = {
            "exp_avg": signed_values(state["exp_avg"], self._spread(state["exp_avg_max"], features)),
            "exp_avg_sq": positive_values(state["exp_avg_sq"], self._spread(state["exp_avg_sq_max"], features)),
            "step": state["step"],
        }
        update, new = super().update(compact_grad, moments, hyper)
        largest = self._largest(new["exp_avg"])
        largest_sq = self._largest(new["exp_avg_sq"])
        return update, {
            "exp_avg": signed_codes(new["exp_avg"], self._spread(largest, features)),
            "exp_avg_max": largest,
            "exp_avg_sq": positive_codes(new["exp_avg_sq"], self._spread(largest_sq, features)),
            "exp_avg_sq_max": largest_sq,
        }

    def _largest(self, values: Tensor) -> Tensor:
        """The largest magnitude of each block: ``[r, n]`` to ``[r, ceil(n / block_size)]``."""
        rows, features = values.shape
        values = values.abs()
        if missing := -features % self.block_size:
            values = torch.nn.functional.pad(values, (0, missing))
        return values.reshape(rows, -1, self.block_size).amax(2)

    def _spread(self, largest: Tensor, features: int) -> Tensor:
        """The largest of its block for each feature: ``[r, ceil(n / block_size)]`` to ``[r, n]``.

        Where blocks do not fill the row, by an index: for a view, Inductor (torch 2.13) splits the loop over features by the
        block size on a CPU, and leaves out what remains (``try_loop_split``). torch 2.11 fails wherever an index divides, so
        there the index comes from a division of numbers, exact for up to four million features.
        """
        rows, blocks = largest.shape
        if largest.device.type == "cpu" and not _aot.CPP_LOOPS_ARE_SAFE:
            middle = torch.arange(features, dtype=torch.float32, device=largest.device) + 0.5
            return largest.index_select(1, (middle / self.block_size).floor().to(torch.int64))
        if features % self.block_size:
            return largest.index_select(1, torch.arange(features, device=largest.device) // self.block_size)
        return largest.unsqueeze(2).expand(rows, blocks, self.block_size).reshape(rows, features)


def signed_codes(values: Tensor, largest: Tensor) -> Tensor:
    """``int8`` codes of the fourth-power scale, ``-127 ... 127``."""
    share = _share(values.abs(), largest)
    below = (127 * share.sqrt().sqrt()).floor()
    middle = ((below / 127) ** 4 + ((below + 1) / 127) ** 4) / 2
    return torch.where(share > middle, below + 1, below).copysign(values).to(torch.int8)


def signed_values(codes: Tensor, largest: Tensor) -> Tensor:
    """The inverse of `signed_codes`."""
    root = codes.to(largest.dtype) / 127
    return largest * (root * root.abs() * (root * root))


def positive_codes(values: Tensor, largest: Tensor) -> Tensor:
    """``uint8`` codes of the eighth-power scale, ``1 ... 255``, and 0 for zero."""
    root = _share(values, largest).sqrt().sqrt().sqrt()
    return torch.where(values > 0, (255 * root).round().clamp(min=1), 0).to(torch.uint8)


def positive_values(codes: Tensor, largest: Tensor) -> Tensor:
    """The inverse of `positive_codes`."""
    root = codes.to(largest.dtype) / 255
    return largest * root**8


def _share(values: Tensor, largest: Tensor) -> Tensor:
    return torch.where(largest > 0, values / largest, 0)

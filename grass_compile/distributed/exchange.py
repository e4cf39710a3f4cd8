"""The mean of a vector over the ranks of a group, sent as codes and the same on all of them, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .codes import BLOCK, decode, encode


def all_gather(received: Tensor, sent: Tensor, group: Any, async_op: bool) -> Any:
    """``torch.distributed.all_gather_single``, by the name that it has: torch 2.13 warns of the older one."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(received, sent, group=group, async_op=async_op)


class Mean:
    """A mean on its way. It is summed in fp32.

    With more than two ranks there are two halves, each of which may travel while other work is done: each rank gets a part of
    every vector, and then the mean of every part, which is encoded once more. With two ranks each gets the vector of the other:
    that is as many bytes, and no number is rounded twice.

    Attributes:
        codes: what this rank has sent in the first half; enough to send it again.
        size: how many numbers.
        bytes_sent: what this rank has sent to others so far.
    """

    def __init__(self, codes: Tensor, size: int, bits: int, group: Any) -> None:
        """Start the first half; all ranks have to.

        Args:
            codes: see `encoded`.
            size: how many numbers they are.
            bits: of each.
            group: the process group.
        """
        self.codes, self.size = codes, size
        self._bits, self._group, self._ranks = bits, group, dist.get_world_size(group)
        self._direct = self._ranks <= 2
        if self._direct:
            self._received = codes.new_empty(self._ranks, codes.shape[1])
            self._work: Any = all_gather(self._received, codes, group, True)
            self.bytes_sent = (self._ranks - 1) * codes.numel()
        else:
            self._received = torch.empty_like(codes)
            self._work = dist.all_to_all_single(self._received, codes, group=group, async_op=True)
            self.bytes_sent = (self._ranks - 1) * codes.shape[1]
        self._halves = 2 if self._direct else 1

    @staticmethod
    def encoded(vector: Tensor, bits: int, group: Any) -> Tensor:
        """What a rank sends of its vector, ``uint8``: the codes of all of it, or of a part for each rank."""
        ranks = dist.get_world_size(group)
        parts = 1 if ranks <= 2 else ranks
        length = -(-len(vector) // (parts * BLOCK)) * BLOCK
        return encode(torch.nn.functional.pad(vector, (0, parts * length - len(vector))).view(parts, length), bits)

    def start_second_half(self) -> None:
        """Send what the first half has brought, unless that was done; all ranks have to call this at the same point."""
        if self._halves == 2:
            return
        self._work.wait()
        mine = encode(self._mean(), self._bits)
        self._received = mine.new_empty(self._ranks, mine.shape[1])
        self._work = all_gather(self._received, mine, self._group, True)
        self.bytes_sent += (self._ranks - 1) * mine.numel()
        self._halves = 2

    def wait(self) -> Tensor:
        """The mean, ``fp32[size]``; all ranks have to call this at the same point."""
        self.start_second_half()
        self._work.wait()
        found = self._mean() if self._direct else decode(self._received, self._bits)
        return found.flatten()[: self.size]

    def _mean(self) -> Tensor:
        """That of what was received, ``fp32[1, n]``."""
        return decode(self._received, self._bits).sum(0, keepdim=True) / self._ranks

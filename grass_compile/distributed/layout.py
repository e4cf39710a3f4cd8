"""How a weight and its gradient are spread over processes, as part of what is compiled for it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """The weight is the same on every rank of a group; each has the gradient of its own batch, and the mean is what moves it.

    Attributes:
        group: the name of the process group, as functional collectives know it.
        size: how many ranks it has.
    """

    group: str
    size: int

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over the ranks; all of them have to call this."""
        tensor.div_(self.size)
        reduced = torch.ops._c10d_functional.all_reduce_(tensor, "sum", self.group)
        return torch.ops._c10d_functional.wait_tensor(reduced)  # type: ignore[no-any-return]

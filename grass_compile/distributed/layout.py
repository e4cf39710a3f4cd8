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


def averages(action: str, full: bool, syncs: bool) -> bool:
    """Whether a backward averages one gradient inside its graph.

    Args:
        action: what it does with it.
        full: whether that is the whole gradient.
        syncs: whether it averages what it can.
    """
    if full:  # what is chosen by; of what only adds to rows chosen before, these rows are averaged when it has arrived
        return action == "choose" or (syncs and action == "step")
    return syncs and action != "skip"


def sharded_by(parameter: Tensor) -> str | None:
    """The name of the wrapper that shards a parameter, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return "fully_shard (FSDP2) or another DTensor wrapper"
    if hasattr(parameter, "_fsdp_flattened") or type(parameter).__name__ == "FlatParameter":
        return "FullyShardedDataParallel (FSDP1)"
    return None

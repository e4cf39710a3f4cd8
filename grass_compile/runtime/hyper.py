"""The hyper-parameters of compiled steps, as tensors that stay where they are.

A compiled backward reads its numbers (learning rate, decay, counts, seeds) from a small tensor, so that a schedule compiles
nothing anew. A CUDA graph reads them where they stood when it was recorded; so a change is written in place, and a tensor whose
numbers nobody needs any more serves for the next ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import _autograd
from ..math.transfer import to_device
from .parameter import ProjectedParameter


@dataclasses.dataclass
class Numbers:
    """One tensor.

    Attributes:
        values: what it holds.
        tensor: on the device of the weights.
        users: the weights that it was handed out for.
    """

    values: tuple[float, ...]
    tensor: Tensor
    users: set[ProjectedParameter] = dataclasses.field(default_factory=set)


class HyperTensors:
    """The tensors of one optimizer. Weights with equal `ProjectedParameter.hyper_key` have one in common."""

    def __init__(self) -> None:
        self._found: dict[Any, dict[Any, Numbers]] = {}

    def of(self, record: ProjectedParameter, fresh: bool, max_norm: float | None) -> Tensor:
        """The tensor with the numbers for a weight's next step, brought up to date.

        Args:
            record: the weight's.
            fresh: whether the step is the first of new rows.
            max_norm: what gradients are clipped to.
        """
        group, weight = record.group, record.weight
        decay = 1.0 - float(group["lr"]) * float(group["weight_decay"])
        limit = float("inf") if max_norm is None else max_norm
        values = (*record.rule.hyper(group), decay, float(record.next_step(fresh)), float(record.seed()), limit)
        alike, progress = record.hyper_key(fresh)
        found = self._found.setdefault(alike, {})
        numbers = found.get(progress) or _spare(found)
        if numbers is None or numbers.values != values:
            wide = torch.promote_types(weight.dtype, torch.float32)
            made = to_device(torch.tensor(values, dtype=wide, device="cpu"), weight.device)
            if numbers is None:
                numbers = Numbers(values, made)
            else:
                with _autograd.unversioned([numbers.tensor]):
                    numbers.tensor.copy_(made)
                numbers.values = values
        found[progress] = numbers
        numbers.users.add(record)
        return numbers.tensor

    def forget(self) -> None:
        """The groups or the state were replaced."""
        self._found.clear()


def _spare(found: dict[Any, Numbers]) -> Numbers | None:
    """Take out a tensor whose weights have all gone on to other numbers."""
    for progress, numbers in found.items():
        if not any(record.hyper_key(fresh)[1] == progress for record in numbers.users for fresh in (False, True)):
            numbers.users.clear()
            return found.pop(progress)
    return None

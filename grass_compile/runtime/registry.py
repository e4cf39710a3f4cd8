"""Which record belongs to a parameter that comes into a compiled region.

Parameters are known by their identity, without weak references to them (``torch.utils.swap_tensors``, by which modules may
convert theirs, refuses tensors that have any), and records are held by their optimizers alone: with an optimizer goes all that is
known of its parameters.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from .parameter import ProjectedParameter

_records: dict[int, weakref.ref[ProjectedParameter]] = {}


def register(record: ProjectedParameter) -> None:
    """Make ``record`` the one that compiled regions find for its parameter; the newest optimizer wins."""
    _know(record.parameter, record)


def register_gathered(record: ProjectedParameter, whole: Tensor, found: Any) -> None:
    """Find ``record`` by the whole that FSDP2 gathers of its parameter too.

    Args:
        record: of the sharded parameter.
        whole: the gathered one.
        found: what FSDP2 knows of it.
    """
    record.gathered, record.found = whole, found
    _know(whole, record)


def _know(parameter: Tensor, record: ProjectedParameter) -> None:
    key = id(parameter)

    def forget(reference: weakref.ref[ProjectedParameter]) -> None:
        if _records.get(key) is reference:
            del _records[key]

    _records[key] = weakref.ref(record, forget)


def lookup(parameter: Tensor) -> ProjectedParameter | None:
    """The record of a parameter, or None if no living optimizer projects it."""
    reference = _records.get(id(parameter))
    record = reference() if reference is not None else None
    if record is None or record.owner is None:
        return None
    return record if parameter is record.parameter or parameter is record.gathered else None

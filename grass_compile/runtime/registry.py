"""Which record belongs to a parameter that comes into a compiled region.

Parameters are known by their identity, without weak references to them (``torch.utils.swap_tensors``, by which modules may
convert theirs, refuses tensors that have any), and records are held by their optimizers alone: with an optimizer goes all that is
known of its parameters.
"""

from __future__ import annotations

import weakref

from torch import Tensor

from .parameter import ProjectedParameter

_records: dict[int, weakref.ref[ProjectedParameter]] = {}


def register(record: ProjectedParameter) -> None:
    """Make ``record`` the one that compiled regions find for its parameter; the newest optimizer wins."""
    key = id(record.parameter)

    def forget(reference: weakref.ref[ProjectedParameter]) -> None:
        if _records.get(key) is reference:
            del _records[key]

    _records[key] = weakref.ref(record, forget)


def lookup(parameter: Tensor) -> ProjectedParameter | None:
    """The record of a parameter, or None if no living optimizer projects it."""
    reference = _records.get(id(parameter))
    record = reference() if reference is not None else None
    return record if record is not None and record.parameter is parameter and record.owner is not None else None

"""The compact state of one weight: its tensors, with their shapes and dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import rank_along
from ..config import SiteConfig
from ..keywords import Axis
from ..math.projection import SELECTORS
from ..math.rule import Rule


@dataclasses.dataclass(frozen=True)
class Assigned:
    """How a weight is projected; settled when its first graph is analysed, and fixed from then on."""

    axis: Axis
    dim: int
    rank: int
    why: str = dataclasses.field(default="", compare=False)


def fits(config: SiteConfig, shape: Sequence[int]) -> bool:
    """Whether a matrix of this shape can be projected."""
    return min(shape) >= 2 and max(shape) >= config.rank


def likely(config: SiteConfig, shape: tuple[int, int], sharded_dim: int | None = None) -> Assigned:
    """How the weight of an ``nn.Linear`` is projected; with ``axis="auto"``, how it most likely is.

    Args:
        config: what is asked of it.
        shape: ``[m, n]``.
        sharded_dim: the dimension of which each rank owns a part, if there is one.
    """
    axis: Axis = config.axis if config.axis != "auto" else "columns"
    if config.axis == "auto" and (sharded_dim == 1 or (config.projection != "grass" and shape[0] < shape[1])):
        axis = "rows"
    dim = 0 if axis == "rows" else 1
    return Assigned(axis, dim, rank_along(config.rank, shape[dim]))


def is_compact(state: Mapping[str, Any]) -> bool:
    """Whether an entry of an optimizer's state is that of a projected weight."""
    return any(selector in state for selector in SELECTORS.values())


def initial_state(
    parameter: Tensor,
    assigned: Assigned,
    on_refresh: str,
    rule: Rule,
    state_dtype: torch.dtype | None = None,
    checked: bool = False,
    projection: str = "grass",
) -> dict[str, Any]:
    """The compact state of a weight before its first refresh.

    Returns:
        ``index`` ``int64[r]`` and ``row_scale`` ``[r]``, or with a dense projection ``basis`` ``[m, r]`` (in the weight's dtype)
        or ``key`` ``int64[2]``; ``step`` (0-d on the CPU, as torch keeps it; beside the moments if the step itself counts it, and
        then ``[r]`` if by row); ``updates`` (how many the weight has had in all); ``nonfinite`` (``int32[1]``, how many of them
        were skipped); ``axis`` and ``dim`` (the stored dimension that is indexed); and the rule's state by its layout, in the
        dtype that the rule names, ``state_dtype``, or at least fp32.
    """
    dtype, device = torch.promote_types(parameter.dtype, torch.float32), parameter.device
    counted = checked or on_refresh == "carry"
    shape = list(parameter.shape)
    shape[assigned.dim] = assigned.rank
    state: dict[str, Any] = {
        **_initial_selector(parameter, assigned, projection),
        "step": torch.zeros([assigned.rank] if on_refresh == "carry" else [], device=device if counted else "cpu"),
        "updates": 0,
        "nonfinite": torch.zeros(1, dtype=torch.int32, device=device),
        "axis": assigned.axis,
        "dim": assigned.dim,
    }
    for name in rule.state_names:
        full = rule.layout(name) == "full"
        kind = rule.state_dtypes.get(name, state_dtype if state_dtype is not None and full else dtype)
        sizes = shape if full else rule.shape(name, assigned.rank, shape[1 - assigned.dim])
        state[name] = torch.zeros(sizes, dtype=kind, device=device)
    return state


def _initial_selector(parameter: Tensor, assigned: Assigned, projection: str) -> dict[str, Tensor]:
    """The tensors that say where the compact gradient lies, before anything was chosen."""
    rank, device = assigned.rank, parameter.device
    if projection == "galore":
        return {"basis": torch.zeros(parameter.shape[assigned.dim], rank, dtype=parameter.dtype, device=device)}
    if projection == "gaussian":
        return {"key": torch.zeros(2, dtype=torch.int64, device=device)}
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return {"index": torch.arange(rank, device=device), "row_scale": torch.ones(rank, dtype=wide, device=device)}


def leaf_like(weight: Tensor, assigned: Assigned) -> Tensor:
    """A tensor of the compact gradient's shape and dtype, without storage of its own."""
    shape = list(weight.shape)
    shape[assigned.dim] = assigned.rank
    return torch.empty((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device).expand(shape)

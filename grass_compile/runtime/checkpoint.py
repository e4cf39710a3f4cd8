"""Compact state on its way into and out of a ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import rank_along
from ..distributed.crossed import placements
from ..distributed.layout import is_sharded, local_part, placed_along
from ..errors import StateError
from ..keywords import AXES
from ..math.projection import SELECTORS
from .compact import Assigned, initial_state
from .parameter import ProjectedParameter

LATER = ("nonfinite",)
"""State that earlier versions did not have; it is made anew where it is missing."""


def fitting(record: ProjectedParameter, entry: Mapping[str, Any]) -> tuple[Assigned, dict[str, Any]]:
    """A copy of a loaded compact state on the weight's device, and how the weight is projected by it.

    Raises:
        StateError: the state does not fit the weight, is not what its optimizer asks for, or is damaged.
    """

    def refuse(what: str) -> StateError:
        return StateError(f"{record.name}: the loaded state {what}. Nothing was changed.")

    parameter, wanted, options = record.parameter, record.options.rank, record.options
    made_with = [projection for projection, selector in SELECTORS.items() if selector in entry]
    if made_with not in ([options.projection], []):
        raise refuse(f"was made with projection={made_with[0]!r}, this optimizer wants {options.projection!r}")
    scaled = ("row_scale",) if options.projection == "grass" else ()
    later = (name for name in LATER if name in entry)
    names = (record.selector, *scaled, "step", *record.rule.state_names, *later)
    if missing := sorted({*names, "updates", "axis", "dim"} - set(entry)):
        raise refuse(f"lacks {missing}")
    tensors = {name: entry[name] for name in names}
    if loose := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise refuse(f"has a {loose[0]} that is not a tensor")
    dim, axis, updates = entry["dim"], entry["axis"], entry["updates"]
    if dim not in (0, 1) or axis not in ("rows", "columns") or type(updates) is not int or updates < 0:
        raise refuse(f"has dim={dim!r}, axis={axis!r} and updates={updates!r}, which makes no sense")
    shape, selector = tuple(parameter.shape), tensors[record.selector]
    needed = 0 if wanted is None else rank_along(wanted, shape[dim])
    rank = _rank_of(options.projection, selector, needed)
    if len(shape) != 2 or wanted is None or rank != needed:
        raise refuse(f"has rank {rank}, which does not fit a weight of shape {shape} with rank {wanted}")
    if options.axis not in ("auto", axis):
        raise refuse(f"is along {axis}, this optimizer wants axis={options.axis!r}")
    if (tensors["step"].dim() == 1) != (options.on_refresh == "carry"):
        raise refuse(f"was made with another on_refresh than {options.on_refresh!r}")
    assigned = Assigned(axis, dim, rank)
    how = options.on_refresh, record.rule, options.state_dtype, options.checked, options.projection
    fresh = initial_state(record.spanned, assigned, *how)
    for name, value in tensors.items():
        if value.shape != fresh[name].shape:
            found, kept = tuple(value.shape), tuple(fresh[name].shape)
            raise refuse(f"has a {name} of shape {found}, where a weight of shape {shape} with rank {wanted} needs {kept}")
        if value.dtype != fresh[name].dtype:
            raise refuse(f"has a {name} of {value.dtype}, where {fresh[name].dtype} is kept (model dtype, or state_dtype=)")
    if damage := _damage(options.projection, selector, rank, shape[dim]):
        raise refuse(f"is damaged: {damage} of shape {shape}")
    lacking = {name: fresh[name] for name in LATER if name not in entry}
    return assigned, {key: _copied(value, record.weight.device) for key, value in entry.items()} | lacking


def _rank_of(projection: str, selector: Tensor, wanted: int) -> int:
    """The rank that a state was made with; ``wanted`` where it does not tell."""
    if projection == "gaussian":
        return wanted
    return selector.shape[1] if projection == "galore" and selector.dim() == 2 else selector.numel()


def _damage(projection: str, selector: Tensor, rank: int, length: int) -> str:
    """The damage to an index, a basis or a key of a weight, in words; empty if it is sound."""
    if projection == "grass":
        sound = len(selector.unique()) == rank and bool(((selector >= 0) & (selector < length)).all())
        return "" if sound else f"index must hold {rank} different rows or columns"
    if projection == "galore":
        return "" if _is_orthonormal(selector) else "basis must hold orthonormal columns, for a weight"
    return "" if bool(((selector >= 0) & (selector < 2**31)).all()) else "key must hold numbers of 31 bits, for a weight"


def _is_orthonormal(basis: Tensor) -> bool:
    """Whether a basis is one, as far as bf16 can tell; before the first refresh it is zero."""
    wide = basis.to(torch.promote_types(basis.dtype, torch.float32))
    unit = torch.eye(basis.shape[1], dtype=wide.dtype, device=wide.device)
    return bool(((wide.t() @ wide - unit).abs() < 0.05).all()) or not bool(basis.any())


def placed(record: ProjectedParameter, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Compact state of a weight of which this rank owns a part, as ``torch.distributed.checkpoint`` takes it: what belongs to the
    part is a ``DTensor`` that is spread as the parameter is, or its gradient. `local` undoes this."""
    dim, rank = entry["dim"], entry[record.selector].numel()
    along = placements(record.parameter)
    return {
        name: placed_along(record.parameter, along, value, dim, rank) if record.owns_part_of(name) else value
        for name, value in entry.items()
    }


def local(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a state as this rank has it; see `placed`."""
    return {name: local_part(value) if isinstance(value, Tensor) else value for name, value in entry.items()}


def check_dense(record: ProjectedParameter, entry: Mapping[str, Any]) -> None:
    """Refuse the state of a dense parameter of another shape.

    Raises:
        StateError: naming the parameter.
    """
    shape = tuple(record.parameter.shape)
    for key, value in entry.items():
        whole = key not in record.rule.state_names or record.rule.layout(key) == "full"
        if isinstance(value, Tensor) and whole and value.dim() > 0 and tuple(value.shape) != shape:
            raise StateError(
                f"{record.name}: the loaded {key} has shape {tuple(value.shape)}, the parameter {shape}; the state belongs to "
                "another model. Nothing was changed."
            )


def _copied(value: Any, device: torch.device) -> Any:
    """A copy of a state value; scalars stay on the CPU, where torch keeps step counts."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().to(device if value.dim() else "cpu")


def protect(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Wrap compact state so that ``torch.optim.Optimizer.load_state_dict`` hands it on as it is.

    Torch casts every floating-point state tensor, and an ``int64`` index with it, to the dtype of the parameter (to fp32 what is
    called ``step``, if the optimizer is fused); and it takes strings apart. Bytes are whole numbers that every dtype holds
    exactly, so tensors travel as these. `unprotect` undoes this.
    """
    for number, entry in state_dict["state"].items():
        if any(isinstance(entry.get(selector), Tensor) for selector in SELECTORS.values()):
            wrapped = {key: _as_bytes(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
            state_dict["state"][number] = wrapped | {"step": entry["step"], "axis": AXES.index(entry["axis"])}
    return state_dict


def _as_bytes(value: Tensor) -> Any:
    if not value.dim():
        return value
    whole = is_sharded(value)  # its bytes would be spread otherwise; of what is called "step", torch at most widens the dtype
    return {"step": value if whole else value.contiguous().view(torch.uint8), "dtype": value.dtype}


def unprotect(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Unwrap what `protect` has wrapped; leave everything else alone."""
    plain = dict(entry)
    for key, value in entry.items():
        if isinstance(value, dict):
            kept, dtype = value["step"], value["dtype"]
            plain[key] = kept.to(dtype) if is_sharded(kept) else kept.to(torch.uint8).view(dtype)
    if isinstance(plain.get("axis"), int):
        plain["axis"] = AXES[plain["axis"]]
    return plain

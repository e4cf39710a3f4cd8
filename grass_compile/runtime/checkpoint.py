"""Compact state on its way into and out of a ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import AXES
from ..errors import StateError
from .state import Assigned, Record


def fitting(record: Record, entry: Mapping[str, Any]) -> tuple[Assigned, dict[str, Any]]:
    """A copy of a loaded compact state on the weight's device, and how the weight is projected by it.

    Raises:
        StateError: the state does not fit the weight, or is not what its optimizer asks for.
    """
    needed = {"index", "row_scale", "step", "updates", "axis", "dim", *record.rule.state_names}
    if missing := sorted(needed - set(entry)):
        raise StateError(f"{record.name}: the loaded state lacks {missing}. Nothing was changed.")
    parameter, rank, wanted, options = record.parameter, len(entry["index"]), record.options.rank, record.options
    shape = list(parameter.shape)
    moments = {name: tuple(entry[name].shape) for name in record.rule.state_names}
    fits = (
        wanted is not None
        and len(shape) == 2
        and rank == min(wanted, shape[entry["dim"]])
        and all(found == (rank, shape[1]) if entry["dim"] == 0 else found == (shape[0], rank) for found in moments.values())
        and (rank == 0 or bool((entry["index"] >= 0).all() and (entry["index"] < shape[entry["dim"]]).all()))
    )
    if not fits:
        raise StateError(
            f"{record.name}: the loaded state has rank {rank} and tensors of shape {moments}, which does not fit a weight of "
            f"shape {tuple(shape)} with rank {wanted}. Nothing was changed."
        )
    if options.axis not in ("auto", entry["axis"]):
        raise StateError(
            f"{record.name}: the loaded state is along {entry['axis']}, this optimizer wants axis={options.axis!r}. Nothing was "
            "changed."
        )
    if (entry["step"].dim() == 1) != (options.on_refresh == "carry"):
        raise StateError(
            f"{record.name}: the loaded state was made with another on_refresh than {options.on_refresh!r}. Nothing was changed."
        )
    tensors = {key: _copied(value, parameter.device) for key, value in entry.items()}
    return Assigned(entry["axis"], entry["dim"], rank), tensors


def check_dense(record: Record, entry: Mapping[str, Any]) -> None:
    """Refuse the state of a dense parameter of another shape.

    Raises:
        StateError: naming the parameter.
    """
    shape = tuple(record.parameter.shape)
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) != shape:
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

    Torch casts every floating-point state tensor, and an ``int64`` index with it, to the dtype of the parameter, unless it is
    called ``step``; and it takes strings apart. `unprotect` undoes this.
    """
    for number, entry in state_dict["state"].items():
        if "index" in entry and not isinstance(entry["index"], dict):
            wrapped = {key: {"step": value} if isinstance(value, Tensor) else value for key, value in entry.items()}
            state_dict["state"][number] = wrapped | {"step": entry["step"], "axis": AXES.index(entry["axis"])}
    return state_dict


def unprotect(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `protect` wrapped; the index is ``int64`` again. Leaves alone what was not wrapped."""
    plain = {key: value["step"] if isinstance(value, dict) else value for key, value in entry.items()}
    plain["index"] = plain["index"].to(torch.int64)
    plain["axis"] = AXES[plain["axis"]] if isinstance(plain.get("axis"), int) else plain.get("axis")
    return plain

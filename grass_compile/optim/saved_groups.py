"""Parameter groups on their way out of a ``state_dict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import parse_group
from ..errors import ConfigError, StateError
from ..keywords import COMMON, STORED


def matching_groups(mine: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The saved groups, completed, after a check that they are groups of this optimizer.

    Args:
        mine: the optimizer's groups.
        state_dict: what its ``state_dict()`` gave.

    Raises:
        StateError: they are those of another rank, axis or model, or not usable.
    """
    groups = []
    if not {"state", "param_groups"} <= set(state_dict):
        raise StateError("load_state_dict takes what state_dict() gave: 'state' and 'param_groups'. Nothing was changed.")
    saved = state_dict["param_groups"]
    if [len(group["params"]) for group in mine] != [len(group["params"]) for group in saved]:
        raise StateError(
            f"the loaded state has groups of {[len(group['params']) for group in saved]} parameters, this optimizer of "
            f"{[len(group['params']) for group in mine]}: it belongs to another model. Nothing was changed."
        )
    for group, other in zip(mine, saved, strict=True):
        merged = {**{keyword.name: group[keyword.name] for keyword in STORED}, **other}
        for name, parameter in zip(group.get("param_names") or [], group["params"], strict=False):
            for key in ("rank", "axis", "projection"):
                if merged[key] != group[key]:
                    raise StateError(
                        f"{name}: the loaded state was made with {key}={merged[key]!r}, this optimizer with "
                        f"{key}={group[key]!r} (weight of shape {tuple(parameter.shape)}). Nothing was changed."
                    )
        try:
            parse_group(merged)
        except ConfigError as error:
            raise StateError(f"the loaded parameter groups are not usable: {error} Nothing was changed.") from error
        groups.append(merged)
    for key in COMMON:
        if len({group[key] for group in groups}) > 1:
            raise StateError(f"{key} differs between the loaded parameter groups. Nothing was changed.")
    return groups

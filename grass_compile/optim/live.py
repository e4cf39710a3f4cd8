"""The groups in ``optimizer.param_groups``: a value assigned during training takes effect, or is refused."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import ConfigError
from ..keywords import PROJECT
from ..math.rule import Rule

FLAGS = ("amsgrad", "capturable", "differentiable", "maximize", "nesterov")
"""Keywords of torch that the compact step has built in, the same for all groups."""


class Owner(Protocol):
    """The optimizer that a group belongs to."""

    defaults: dict[str, Any]
    rule: Rule

    def _change(self, group: ParamGroup, values: Mapping[str, Any]) -> None:
        """Have keywords of ours hold from now on."""


class ParamGroup(dict[str, Any]):
    """One parameter group. Copies and pickles of it are plain dicts.

    Keywords of ours that may change during training (`Keyword.live`) go to the optimizer at once; those that belong to it as a
    whole go into its other groups too. The other keywords shape the state of the projected weights, and assigning another value
    raises `ConfigError`. Torch's own (``lr``, ``betas``, ...) are read at every step.
    """

    def __init__(self, group: Mapping[str, Any], optimizer: Owner) -> None:
        super().__init__(group)
        self._optimizer, self._flags = weakref.ref(optimizer), flags_of(optimizer.rule)

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def update(self, *args: Any, **values: Any) -> None:
        """Assign all, or, if one of them is refused, none.

        Raises:
            ConfigError: a value is invalid, or one would change that cannot.
            StateError: a forward waits for its backward that was made with the old value.
        """
        new = dict(*args, **values)
        for key, value in new.items():
            self._check(key, value)
        live = {key: value for key, value in new.items() if key in PROJECT}
        optimizer = self._optimizer()
        if live and optimizer is not None:
            optimizer._change(self, live)
        super().update(new)

    def _check(self, key: str, value: Any) -> None:
        """Refuse another value for what cannot change.

        Raises:
            ConfigError: naming the key, and what to do.
        """
        if key == "preset":
            raise ConfigError("preset is spelled out when a group is made; assign the keywords that it stands for.")
        if key == "params" and [id(p) for p in value] != [id(p) for p in self["params"]]:
            raise ConfigError("params of a group cannot change; add parameters with add_param_group().")
        if key in self._flags and value != self.get(key, False):
            raise ConfigError(f"{key} cannot change in mid-run; make a new optimizer with {key}={value!r}.")
        keyword = PROJECT.get(key)
        if keyword is None or keyword.live:
            return
        if keyword.check(key, value) != keyword.check(key, self[key]):
            raise ConfigError(
                f"{key} cannot change from {self[key]!r} to {value!r} in mid-run: the compact state was made with it. Make a new "
                f"optimizer with {key}={value!r}."
            )

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As for a dict."""
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, values: Any) -> ParamGroup:  # type: ignore[override, misc]
        self.update(values)
        return self

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def pop(self, key: str, *default: Any) -> Any:
        """As for a dict, for what others have put in.

        Raises:
            ConfigError: the optimizer needs it.
        """
        optimizer = self._optimizer()
        if key in self and (key in PROJECT or key == "params" or (optimizer is not None and key in optimizer.defaults)):
            raise ConfigError(f"{key} cannot be taken out of a parameter group.")
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a parameter group cannot be emptied.")

    def clear(self) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a parameter group cannot be emptied.")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def flags_of(rule: Rule) -> set[str]:
    """The `FLAGS` that a rule does not read from the group as a number of its own."""
    return set(FLAGS) - set(rule.hyper_names)


def check_flags(group: Mapping[str, Any], optimizer: Owner) -> None:
    """Refuse a group whose flags differ from its optimizer's: the compact step has them built in.

    Raises:
        ConfigError: naming the flag.
    """
    for flag in sorted(flags_of(optimizer.rule)):
        if flag in group and group[flag] != optimizer.defaults.get(flag, False):
            raise ConfigError(f"{flag}={group[flag]!r} differs from the optimizer's; it is the same for all parameter groups.")

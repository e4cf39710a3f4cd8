"""`Optimizer`: the class of every optimizer of this package, and by itself an optimizer for any update rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import finite, nearest
from ..errors import ConfigError
from ..math.transfer import to_device
from ..math.update import run_rule
from ..runtime.compact import is_compact
from .base import GrassOptimizer
from .rules import RESERVED, Rule, registered_rules


class Optimizer(GrassOptimizer):
    """Any update rule in the compact space; the dense rest goes through the same rule, eagerly.

    All optimizers of this package are instances of this class.

    Args:
        params: as for `AdamW`.
        rule: a `Rule`, or the name of a registered one (``grass_compile.register_rule``).
        **keywords: those of the rule (its ``defaults``), and ``rank`` and the others of `ProjectKeywords`.

    Raises:
        ConfigError: the rule is not known; or as for `AdamW`.
    """

    def __init__(self, params: Iterable[Any], rule: Rule | str, **keywords: Any) -> None:
        known = registered_rules()
        if isinstance(rule, str):
            if rule not in known:
                raise ConfigError(f"rule={rule!r} is not known.{nearest(rule, known)}")
            rule = known[rule]
        if not isinstance(rule, Rule):
            raise ConfigError(f"rule must be a grass_compile.Rule or the name of one, got {type(rule).__name__}.")
        if taken := sorted(RESERVED & set(rule.state_names)):
            raise ConfigError(f"{type(rule).__name__}: the state name {taken[0]!r} is taken; choose another one.")
        defaults = {"weight_decay": 0.0, **rule.defaults}
        own = {key: value for key, value in keywords.items() if key not in defaults}
        chosen = {**defaults, **{key: value for key, value in keywords.items() if key in defaults}}
        _check_numbers(type(self).__name__, chosen)
        super().__init__(params, rule, own, defaults=chosen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for `AdamW`; here the state of dense parameters is ours too, and keeps its dtypes, which torch would turn into the
        parameter's.

        Raises:
            StateError: as for `AdamW`.
        """
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, number in zip(mine, saved, strict=True):
            entry = state_dict["state"].get(number, {})
            if not is_compact(entry):
                kept = {name: entry[name].detach().clone() for name in self.rule.state_names if name in entry}
                self.state[parameter].update({name: tensor.to(parameter.device) for name, tensor in kept.items()})

    @torch.no_grad()
    def _dense_step(self) -> None:
        for group in self.param_groups:
            names, values = self.rule.hyper_names, self.rule.hyper(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    numbers = to_device(torch.tensor(values, dtype=wide, device="cpu"), parameter.device)
                    self._move(parameter, dict(zip(names, numbers.unbind(), strict=True)), group, wide)

    def _move(self, parameter: Tensor, hyper: Mapping[str, Tensor], group: Mapping[str, Any], wide: torch.dtype) -> None:
        """Move one dense parameter, seen as a matrix with all rows selected; a vector is a single row."""
        assert parameter.grad is not None
        rule, state = self.rule, self.state[parameter]
        shape = (parameter.shape[0], -1) if parameter.dim() > 1 else (1, -1)
        weight, gradient = (tensor.reshape(shape).to(wide) for tensor in (parameter, parameter.grad))
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            for name in rule.state_names:
                sizes = parameter.shape if rule.layout(name) == "full" else rule.shape(name, *gradient.shape)
                state[name] = gradient.new_zeros(sizes, dtype=rule.state_dtypes.get(name))
        state["step"] += 1
        full = {name: state[name].reshape(gradient.shape) for name in rule.state_names if rule.layout(name) == "full"}
        seen = {name: full[name] if name in full else rule.seen(name, state[name]) for name in rule.state_names}
        seen |= {"step": to_device(state["step"].to(wide), weight.device), **({"weight": weight} if rule.reads_weight else {})}
        if rule.coupled_decay:
            gradient = gradient + float(group["weight_decay"]) * weight
        update, new = run_rule(rule, gradient, seen, hyper)
        if not rule.coupled_decay:
            weight = weight * (1.0 - float(group["lr"]) * float(group["weight_decay"]))
        parameter.copy_((weight - update).view(parameter.shape))
        for name, tensor in new.items():
            state[name].copy_(tensor.view(state[name].shape))


class TorchRest(Optimizer):
    """An optimizer whose dense rest is stepped by a class of ``torch.optim``: the one that comes next among its bases."""

    __init__ = GrassOptimizer.__init__
    load_state_dict = GrassOptimizer.load_state_dict
    _dense_step = GrassOptimizer._dense_step


def _check_numbers(what: str, chosen: Mapping[str, Any]) -> None:
    """Refuse numbers that make no sense for any rule.

    Raises:
        ConfigError: a negative learning rate or weight decay, or a beta outside of [0, 1).
    """
    for key in ("lr", "weight_decay"):
        if finite(f"{what}: {key}", chosen[key]) < 0:
            raise ConfigError(f"{what}: {key} must not be negative, got {chosen[key]!r}.")
    for beta in chosen.get("betas", ()):
        if not 0.0 <= finite(f"{what}: betas", beta) < 1.0:
            raise ConfigError(f"{what}: betas must be in [0, 1), got {chosen['betas']!r}.")

"""The optimizers: each a ``torch.optim.Optimizer`` whose linear weights move inside the compiled backward."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..config import DEFAULT_EXCLUDE, PROJECT, AxisChoice, finite, nearest, parse_group
from ..errors import ConfigError, GrassWarning, StateError
from .checkpoint import check_dense, fitting, unprotect
from .holder import Holder
from .rules import AdafactorRule, AdamWRule, Layout, LionRule, Rule, SGDRule, registered_rules
from .step import run_rule

COMMON = ("step_in_backward", "max_grad_norm")
"""Keywords that belong to an optimizer as a whole."""


class GrassOptimizer(torch.optim.Optimizer):
    """What every grass optimizer shares: a holder for the backend. The dense rest is stepped by the class that comes next, most
    often torch's own.

    A parameter is *projected* once a compiled backward has found its gradient; from then on it moves there and its ``.grad``
    stays None, or its ``.grad`` is a `CompactGrad` and it moves in `step`.
    """

    rule: Rule

    def __init__(self, params: Any, *, own: Mapping[str, Any], **torch_keywords: Any) -> None:
        """Set up groups.

        Args:
            params: parameters, named parameters or groups, as for any torch optimizer.
            own: defaults of the keywords that are ours.
            **torch_keywords: defaults of torch's keywords.
        """
        self._own = dict(own)
        self._holder = Holder(self, fused=True)
        self._warned = False
        try:
            super().__init__(params, **torch_keywords)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from error
        self.defaults.update(self._own)
        self._settle()

    def _settle(self) -> None:
        """Take from the groups what has to be common to all."""
        group = self.param_groups[0]
        self._holder.fused = group["step_in_backward"]
        self._holder.max_norm = None if group["max_grad_norm"] is None else float(group["max_grad_norm"])

    # ------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; keywords that it lacks take the optimizer's defaults.

        Raises:
            ConfigError: an unknown or invalid keyword, a parameter that is there already, or one that cannot be trained here.
        """
        for key, value in self._own.items():
            param_group.setdefault(key, value)
        unknown = set(param_group) - {"params", "param_names", "initial_lr", *self._own, *self.defaults}
        if unknown:
            raise ConfigError(f"parameter group has unknown keywords {sorted(unknown)}; valid: {sorted(self._own)}.")
        options = parse_group(param_group)
        given = param_group["params"]
        param_group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
        names = [entry[0] if isinstance(entry, tuple) else f"parameter {i}" for i, entry in enumerate(given)]
        self._check_parameters(tensors, names)
        for key in COMMON:
            if self.param_groups and self.param_groups[0][key] != param_group[key]:
                raise ConfigError(f"{key} differs between parameter groups; it belongs to the optimizer as a whole.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter, name in zip(group["params"], group.get("param_names") or [""] * len(tensors), strict=True):
            self._holder.add(parameter, name, group, options, self.rule)

    def _check_parameters(self, tensors: Sequence[Any], names: Sequence[str]) -> None:
        seen: set[int] = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for tensor, name in zip(tensors, names, strict=True):
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"{name}: an optimizer takes tensors, got {type(tensor).__name__}.")
            if id(tensor) in seen:
                raise ConfigError(f"{name}: it is in the optimizer twice; give each parameter once.")
            seen.add(id(tensor))
            if tensor.layout is not torch.strided:
                raise ConfigError(f"{name}: sparse weights are not supported; give them to another optimizer.")
            if tensor.is_complex():
                raise ConfigError(f"{name}: complex weights are not supported; give them to another optimizer.")
            if wrapper := _torch.sharded_by(tensor):
                raise ConfigError(
                    f"{name}: it is sharded by {wrapper}, which is not supported yet; train it on one device or with "
                    "torch.optim.AdamW."
                )

    # --------------------------------------------------------------------------------------------------------- step

    @_torch.outside_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the compact gradients that wait, move the dense parameters (norms, embeddings, biases, refused weights), and
        close the step.

        Args:
            closure: as in torch; it runs forward and backward, in which projected weights may move.

        Raises:
            StateError: a projected weight has a full gradient as well, from outside its compiled region.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        holder = self._holder
        holder.check()
        self._warn_uncompiled()
        if holder.max_norm is not None and not holder.clipped:
            holder.clip(holder.max_norm)
        waiting = holder.pending()
        holder.apply(waiting)
        try:
            for parameter in waiting:
                parameter.grad = None
            self._dense_step()
        finally:
            for parameter, gradient in waiting.items():
                parameter.grad = gradient
        holder.close()
        return loss

    def _dense_step(self) -> None:
        """Move what is not projected."""
        super().step()

    def _warn_uncompiled(self) -> None:
        """Say once that nothing is compiled."""
        if self._warned or any(record.assigned for record in self._holder.records.values()):
            return
        dense = [
            record.name
            for parameter, record in self._holder.records.items()
            if parameter.grad is not None and record.options.rank is not None and parameter.dim() == 2
        ]
        initialises = all(float(group["lr"]) == 0 for group in self.param_groups)  # torch.distributed.checkpoint does
        if dense and not initialises and not any(self.state.get(parameter) for parameter in self._holder.records):
            self._warned = True
            warnings.warn(
                f"{len(dense)} weights, {dense[0] or 'unnamed'} the first, got full gradients: no compiled "
                'backward holds them. Compile the model: model = torch.compile(model, backend="grass").',
                GrassWarning,
                stacklevel=_torch.stacklevel_of_caller(),
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``GradScaler.step`` asks first.

        Raises:
            StateError: the gradients of the weights that moved inside the backward were scaled.
        """
        if self._holder.fused:
            raise StateError(
                "GradScaler scales the loss, and with it the gradients that have already moved the weights inside the backward. "
                "Make the optimizer with step_in_backward=False."
            )
        return False

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """For every micro-batch but the last: inside, ``backward()`` leaves compact gradients and moves nothing.

        Compact gradients add up in ``.grad`` (at least fp32) and are applied by `step`. On a refresh the first
        micro-batch chooses the rows.
        """
        return self._holder.accumulate()

    # ---------------------------------------------------------------------------------------------------- gradients

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm before the last clipping, 0-d, on the device; None if nothing was clipped yet.

        The norm is that of what is computed: the dense gradients, and of each projected weight the selected rows, without their
        row scale. It is therefore smaller than the norm of all full gradients.
        """
        return self._holder.grad_norm

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of all parameters, compact and dense, by their common norm, as FSDP's method of this name does.

        Args:
            max_norm: the largest norm allowed.
            norm_type: the order of the norm.

        Returns:
            The norm before clipping (see `grad_norm`).

        Raises:
            StateError: weights have already moved inside the backward.
        """
        return self._holder.clip(max_norm, norm_type)

    def compact_grad(self, parameter: Tensor) -> Tensor | None:
        """The compact gradient of a projected weight that waits for `step`: ``[r, n]`` or ``[m, r]``; None if there is none.

        Raises:
            ConfigError: the optimizer does not hold this parameter.
        """
        if parameter not in self._holder.records:
            raise ConfigError("compact_grad: this optimizer does not hold that parameter.")
        pending = self._holder.records[parameter].pending
        return None if pending is None else pending.compact

    # ---------------------------------------------------------------------------------------------------- checkpoint

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave; compact state keeps its own dtypes, and keywords of ours that the saved groups lack
        stay as they are.

        Raises:
            StateError: the state is of another rank, axis, shape or model; names the parameter. Nothing was changed.
        """
        groups = self._matching_groups(state_dict)
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        loaded = {}
        for parameter, index in zip(order, saved, strict=True):
            entry = state_dict["state"].get(index, {})
            record = self._holder.records[parameter]
            if "index" in entry:
                loaded[parameter] = fitting(record, unprotect(entry))
            else:
                check_dense(record, entry)
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group in self.param_groups:
            options = parse_group(group)
            for parameter in group["params"]:
                record = self._holder.records[parameter]
                record.group, record.options, record.assigned = group, options, None
                if parameter in loaded:
                    record.assigned, self.state[parameter] = loaded[parameter]
                record.forget()
        self._holder.forget_numbers()
        self._settle()

    def _matching_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The saved groups, completed, after a check that they are groups of this optimizer."""
        groups = []
        if not {"state", "param_groups"} <= set(state_dict):
            raise StateError("load_state_dict takes what state_dict() gave: 'state' and 'param_groups'. Nothing was changed.")
        mine, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in mine] != [len(group["params"]) for group in saved]:
            raise StateError(
                f"the loaded state has groups of {[len(group['params']) for group in saved]} parameters, this optimizer of "
                f"{[len(group['params']) for group in mine]}: it belongs to another model. Nothing was changed."
            )
        for group, other in zip(mine, saved, strict=True):
            merged = {**{key: group[key] for key in self._own}, **other}
            for name, parameter in zip(group.get("param_names") or [], group["params"], strict=False):
                for key in ("rank", "axis"):
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


class AdamW(GrassOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """AdamW with structured sparse gradients (Grass, arXiv 2406.17660), fused into the compiled backward.

    Of the gradient ``m x n`` of each linear weight only ``rank`` rows or columns are ever computed; the moments have that
    size, and only these rows of the weight move until the next refresh chooses others. Everything else is trained by
    ``torch.optim.AdamW``, whose arguments keep their names and meaning. With ``rank`` equal to the weight's size along ``axis``
    training equals ``torch.optim.AdamW`` to rounding.

    ``state[p]`` of a projected weight holds ``index`` (``int64[r]``), ``row_scale`` (``[r]``), ``exp_avg`` and ``exp_avg_sq``
    (``[r, n]`` for rows, ``[m, r]`` for columns; transposed for a weight that is stored in x out), ``step`` (updates since the
    moments were last zero; per row with ``on_refresh="carry"``), ``updates`` (updates in all) and ``axis``.

    Args:
        params: ``model.named_parameters()`` (the names serve ``exclude`` and messages), ``parameters()``, or groups; a group may
            override any keyword below.
        lr: learning rate; may change at any time without a recompilation.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        rank: r, the number of rows or columns that move at a time; None keeps the group dense.
        update_proj_gap: steps between refreshes; the first backward is always a refresh.
        selection: ``"top"``, the rows of largest norm; ``"norm"``, ``"norm2"`` or ``"uniform"``: rows drawn without
        replacement, with
            probabilities proportional to the norm, its square, or one.
        replacement: draw with replacement, independently, and scale each row by ``rho = 1 / sqrt(rank * probability)`` before and
            after the update rule, once for each time it was drawn: what is applied is unbiased for a linear rule.
        axis: ``"rows"`` (out-features), ``"columns"`` (in-features) or ``"auto"`` (the cheaper by the cost model).
        on_refresh: ``"reset"`` zeroes the moments; ``"carry"`` keeps those of rows that stay selected; ``"keep"`` hands the
        moments of
            the old rows to the new ones, slot by slot.
        block: neighbouring rows that are chosen together; divides ``rank``.
        stagger: spread the refreshes of different weights over the interval, in 4 parts or in as many as it says; in a model
        that is
            compiled as a whole each part costs a compilation.
        scale: the paper's alpha, a factor on the update.
        exclude: name patterns (``fnmatch``) that stay dense.
        step_in_backward: the weights move inside ``loss.backward()``; if False, compact gradients are left in ``.grad``
            until ``opt.step()``.
        max_grad_norm: clip all gradients, compact and dense, by their common norm; inside the backward if one compiled region
            covers all trainable parameters, otherwise the weights move in ``opt.step()``. See `grad_norm`.
        refresh_warmup: steps after each refresh over which the learning rate of projected weights rises linearly to ``lr``.
        stochastic_rounding: round bf16 weights (and bf16 moments) stochastically, so that updates below half a unit in the
            last place are not lost.
        state_dtype: dtype of the moments; None for at least fp32.
        seed: of drawn rows and of the stochastic rounding; None draws one from torch's default generator. It is part of the
            state.

    Raises:
        ConfigError: an argument is out of range, unknown, or not available in this version.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        selection: str = "top",
        replacement: bool = False,
        axis: AxisChoice = "auto",
        on_refresh: str = "reset",
        scale: float = 1.0,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        step_in_backward: bool = True,
        max_grad_norm: float | None = None,
        refresh_warmup: int = 0,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        block: int = 1,
        stagger: bool | int = False,
    ) -> None:
        self.rule = AdamWRule()
        own = _own_keywords(
            rank=rank, update_proj_gap=update_proj_gap, selection=selection, replacement=replacement, axis=axis,
            on_refresh=on_refresh, scale=scale, exclude=exclude,
            step_in_backward=step_in_backward, max_grad_norm=max_grad_norm, refresh_warmup=refresh_warmup,
            stochastic_rounding=stochastic_rounding, state_dtype=state_dtype, block=block, stagger=stagger, seed=seed,
        )  # fmt: skip
        super().__init__(params, own=own, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)


class SGD(GrassOptimizer, torch.optim.SGD):  # type: ignore[override]
    """SGD with momentum in the compact space; the dense rest through ``torch.optim.SGD``, whose arguments keep their names.

    ``state[p]`` of a projected weight holds ``momentum_buffer`` if there is momentum. Weight decay is added to the gradient, of
    projected weights to that of the selected rows.

    Args:
        params: as of `AdamW`.
        lr: learning rate.
        momentum: factor on the buffer.
        dampening: what a gradient lacks in the buffer.
        weight_decay: the L2 penalty.
        nesterov: Nesterov's momentum.
        **project: ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **project: Any,
    ) -> None:
        self.rule = SGDRule(momentum != 0, nesterov)
        keywords = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, own=_own_keywords(**project), **keywords, foreach=True)


class Adafactor(GrassOptimizer, torch.optim.Adafactor):
    """Adafactor in the compact space; the dense rest through ``torch.optim.Adafactor``, whose arguments keep their names.

    ``state[p]`` of a projected weight holds ``row_var`` (``[r]``) and ``col_var`` (``[n]``, ``[m]`` for columns): the state of
    a weight is a few vectors.

    Args:
        params: as of `AdamW`.
        lr: an upper bound of the relative step size.
        beta2_decay: the exponent by which the second moment's memory grows.
        eps: a floor for squares, None for fp32's epsilon, and one for the size of the weight.
        d: an upper bound of the update's root mean square.
        weight_decay: decoupled weight decay, on the whole weight.
        **project: ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **project: Any,
    ) -> None:
        self.rule = AdafactorRule()
        keywords = dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay)
        super().__init__(params, own=_own_keywords(**project), **keywords, foreach=True)


class Optimizer(GrassOptimizer):
    """Any update rule in the compact space; the dense rest goes through the same rule, eagerly.

    Args:
        params: as of `AdamW`.
        rule: a `Rule`, or the name of a registered one (``grass_compile.register_rule``).
        **keywords: those of the rule (its ``defaults``), and ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: the rule is not known; or as of `AdamW`.
    """

    def __init__(self, params: Iterable[Any], rule: Rule | str, **keywords: Any) -> None:
        known = registered_rules()
        if isinstance(rule, str):
            if rule not in known:
                raise ConfigError(f"rule={rule!r} is not known.{nearest(rule, known)}")
            rule = known[rule]
        if not isinstance(rule, Rule):
            raise ConfigError(f"rule must be a grass_compile.Rule or the name of one, got {type(rule).__name__}.")
        self.rule = rule
        defaults = {"weight_decay": 0.0, **rule.defaults}
        own = {key: value for key, value in keywords.items() if key not in defaults}
        chosen = {**defaults, **{key: value for key, value in keywords.items() if key in defaults}}
        _check_numbers(type(self).__name__, chosen)
        super().__init__(params, own=_own_keywords(**own), defaults=chosen)

    @torch.no_grad()
    def _dense_step(self) -> None:
        for group in self.param_groups:
            names, values = self.rule.hyper_names, self.rule.hyper(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    numbers = torch.tensor(values, dtype=wide, device=parameter.device)
                    self._move(parameter, dict(zip(names, numbers.unbind(), strict=True)), group, wide)

    def _move(self, parameter: Tensor, hyper: Mapping[str, Tensor], group: Mapping[str, Any], wide: torch.dtype) -> None:
        """One dense parameter, seen as a matrix of which all rows are selected; a vector is a single row."""
        assert parameter.grad is not None
        rule, state = self.rule, self.state[parameter]
        shape = (parameter.shape[0], -1) if parameter.dim() > 1 else (1, -1)
        weight, gradient = (tensor.reshape(shape).to(wide) for tensor in (parameter, parameter.grad))
        if not state:
            state["step"] = torch.zeros(())
            sizes = {"full": gradient.shape, "selected": gradient.shape[:1], "others": gradient.shape[1:]}
            for name in rule.state_names:
                state[name] = gradient.new_zeros(sizes[rule.layout(name)])
        state["step"] += 1
        seen = {name: _broadcast(rule.layout(name), state[name]) for name in rule.state_names}
        seen |= {"step": state["step"].to(weight), **({"weight": weight} if rule.reads_weight else {})}
        if rule.coupled_decay:
            gradient = gradient + float(group["weight_decay"]) * weight
        update, new = run_rule(rule, gradient, seen, hyper)
        if not rule.coupled_decay:
            weight = weight * (1.0 - float(group["lr"]) * float(group["weight_decay"]))
        parameter.copy_((weight - update).view(parameter.shape))
        for name, tensor in new.items():
            state[name].copy_(tensor.view(state[name].shape))


def _broadcast(layout: Layout, tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1 if layout == "selected" else 0) if layout != "full" else tensor


class Lion(Optimizer):
    """Lion (arXiv 2302.06675) in the compact space and for the dense rest.

    Args:
        params: as of `AdamW`.
        lr: learning rate.
        betas: of the interpolation and of the momentum.
        weight_decay: decoupled weight decay, on the whole weight.
        **project: ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **project: Any,
    ) -> None:
        super().__init__(params, LionRule(), lr=lr, betas=betas, weight_decay=weight_decay, **project)


def _check_numbers(what: str, chosen: Mapping[str, Any]) -> None:
    """Refuse what no rule can mean.

    Raises:
        ConfigError: a negative learning rate or weight decay, or a beta outside of [0, 1).
    """
    for key in ("lr", "weight_decay"):
        if finite(f"{what}: {key}", chosen[key]) < 0:
            raise ConfigError(f"{what}: {key} must not be negative, got {chosen[key]!r}.")
    for beta in chosen.get("betas", ()):
        if not 0.0 <= finite(f"{what}: betas", beta) < 1.0:
            raise ConfigError(f"{what}: betas must be in [0, 1), got {chosen['betas']!r}.")


def _own_keywords(**given: Any) -> dict[str, Any]:
    """Our keywords, completed.

    Raises:
        ConfigError: an unknown one.
    """
    for key in given:
        if key not in PROJECT:
            raise ConfigError(f"{key}={given[key]!r}: this optimizer has no such argument.{nearest(key, PROJECT)}")
    own = {**PROJECT, "rank": 128, **given}
    if not isinstance(own["exclude"], str):
        own["exclude"] = tuple(own["exclude"])
    if given.get("seed") is None:
        draws = own["stochastic_rounding"] or own["selection"] != "top"
        own["seed"] = int(torch.randint(2**31, ())) if draws else 0
    return own

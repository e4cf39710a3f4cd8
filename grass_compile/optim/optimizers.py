"""The optimizers: each a ``torch.optim.Optimizer`` whose linear weights move inside the compiled backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import DEFAULT_EXCLUDE, AxisChoice, NonFinite, finite, nearest, positive_int
from ..errors import ConfigError
from ..math.transfer import to_device
from ..math.update import run_rule
from ..runtime.compact import is_compact
from .base import GrassOptimizer
from .rules import (
    RESERVED,
    AdafactorRule,
    AdamW8bitRule,
    AdamWRule,
    ApolloRule,
    LionRule,
    MuonRule,
    Rule,
    SGDRule,
    SketchyRule,
    registered_rules,
)


class AdamW(GrassOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """AdamW with structured sparse gradients (Grass, arXiv 2406.17660), fused into the compiled backward.

    Of the gradient ``m x n`` of each linear weight only ``rank`` rows or columns are ever computed; the moments have that
    size, and only these rows of the weight move until the next refresh chooses others. Everything else is trained by
    ``torch.optim.AdamW``, whose arguments keep their names and meaning. With ``rank`` equal to the weight's size along ``axis``
    training equals ``torch.optim.AdamW`` to rounding.

    ``state[p]`` of a projected weight holds ``index`` (``int64[r]``), ``row_scale`` (``[r]``), ``exp_avg`` and ``exp_avg_sq``
    (``[r, n]`` for rows, ``[m, r]`` for columns; transposed for a weight that is stored in x out), ``step`` (updates since the
    moments were last zero; per row with ``on_refresh="carry"``), ``updates`` (updates in all), ``nonfinite`` (how many of
    them were skipped, ``int32[1]``) and ``axis``. With a dense projection, ``basis`` (``[m, r]``, ``[n, r]`` for columns) or
    ``key`` (``int64[2]``) takes the place of the first two.

    Args:
        params: ``model.named_parameters()`` (the names serve ``exclude`` and messages), ``parameters()``, or groups; a group may
            override any keyword below.
        lr: learning rate; may change at any time without a recompilation.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        rank: r, the number of rows or columns that move at a time; None keeps the group dense.
        update_proj_gap: steps between refreshes; the first backward is always a refresh.
        selection: ``"top"``, the rows of largest norm; ``"norm"`` or ``"uniform"``: rows drawn without replacement, with
            probabilities proportional to the norm, or all alike. ``"uniform"`` looks at no gradient: its refresh is a regular
            step.
        axis: ``"rows"`` (out-features), ``"columns"`` (in-features) or ``"auto"`` (the cheaper by the cost model; with a dense
            projection the shorter side, as GaLore takes it).
        on_refresh: ``"reset"`` zeroes the moments; ``"carry"`` keeps those of rows that stay selected; ``"keep"`` hands the
            moments of the old rows to the new ones, slot by slot.
        stagger: spread the refreshes of different weights over the interval, in as many parts as it says. True: 4, since in a
            model that is compiled as a whole each part costs a compilation; where rows are drawn blindly or by estimated scores
            it does not, and each weight has a step of its own.
        scores: what new rows are chosen by: ``"exact"``, the norms of the full gradient, which the refresh forms, one layer at a
            time; ``"sampled"``, those of the gradient of every eighth token; ``"estimate"``, a sketch of the norms (rows) or
            the norms of the inputs (columns). With the latter two no full gradient is ever formed, a refresh is a step of the
            old rows, and the new ones serve from the next step on; until the second step, these are the first rows. An estimate
            is part of every step's graph, so that a refresh is not another one to compile.
        share_index: weights that read the same activations (q, k, v; gate, up) choose their columns together, by the sum of their
            scores, so that one gathered copy serves all of them. Not with ``scores="exact"``; rows are never shared.
        scale: the paper's alpha, a factor on the update.
        exclude: name patterns (``fnmatch``) that stay dense.
        step_in_backward: the weights move inside ``loss.backward()``; if False, compact gradients are left in ``.grad``
            until ``opt.step()``.
        max_grad_norm: clip all gradients, compact and dense, by their common norm; inside the backward if one compiled region
            covers all trainable parameters, otherwise the weights move in ``opt.step()``. See `grad_norm`.
        stochastic_rounding: round bf16 weights (and bf16 moments) stochastically, so that updates below half a unit in the
            last place are not lost.
        state_dtype: dtype of the moments; None for at least fp32.
        seed: of drawn rows, of random projections and of the stochastic rounding; None draws one from torch's default
            generator. It is part of the state.
        nonfinite: what becomes of a gradient that is infinite or NaN. ``"raise"``: the step of this parameter is skipped, and
            `step` (on a GPU, the next one) raises `NonFiniteError` with its name; ``"skip"``: it is skipped and counted in
            ``state[p]["nonfinite"]``; ``"propagate"``: it spreads, as in torch.
        projection: ``"grass"`` selects rows; ``"galore"`` projects onto the first ``rank`` singular vectors of the gradient at
            the last refresh (arXiv 2403.03507; galore-torch has ``on_refresh="keep"`` and ``scale=0.25``); ``"gaussian"`` onto
            random vectors that are computed from a seed and never stored (Flora, arXiv 2402.03293).

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
        axis: AxisChoice = "auto",
        on_refresh: str = "reset",
        scale: float = 1.0,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        step_in_backward: bool = True,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        stagger: bool | int = False,
        scores: str = "exact",
        nonfinite: NonFinite = "raise",
        projection: str = "grass",
        share_index: bool = False,
    ) -> None:
        own = dict(
            rank=rank, update_proj_gap=update_proj_gap, selection=selection, axis=axis,
            on_refresh=on_refresh, scale=scale, exclude=exclude,
            step_in_backward=step_in_backward, max_grad_norm=max_grad_norm,
            stochastic_rounding=stochastic_rounding, state_dtype=state_dtype, stagger=stagger, seed=seed,
            scores=scores, nonfinite=nonfinite, projection=projection, share_index=share_index,
        )  # fmt: skip
        super().__init__(params, AdamWRule(), own, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)


class AdamW8bit(GrassOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """AdamW in the compact space with moments of 8 bits; the dense rest through ``torch.optim.AdamW``, with moments in full.

    ``state[p]`` of a projected weight holds the codes ``exp_avg`` (``int8``) and ``exp_avg_sq`` (``uint8``), ``[r, n]`` or
    ``[m, r]``, and the largest magnitude of each block of 128 features of a row, ``exp_avg_max`` and ``exp_avg_sq_max``,
    ``[r, ceil(n / 128)]`` or ``[r, ceil(m / 128)]``: 2.06 bytes for an element where `AdamW` has 8. `AdamW8bitRule` in
    ``grass_compile.optim.rules`` says what the codes stand for, and their errors.

    Args:
        params: as of `AdamW`.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        **project: ``rank`` and the other keywords of `AdamW` from there on, but for ``state_dtype``.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **project: Any,
    ) -> None:
        super().__init__(params, AdamW8bitRule(), project, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)


class Apollo(GrassOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """APOLLO (arXiv 2412.05270) in the compact space, a learning rate for each selected row; the dense rest through
    ``torch.optim.AdamW``, as in the paper.

    ``state[p]`` of a projected weight holds Adam's moments in the auxiliary space, ``exp_avg`` and ``exp_avg_sq`` (``[r,
    directions]``), and ``norm``, the norm of the last update: a few numbers for each row.

    Args:
        params: as of `AdamW`.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        directions: rank of the auxiliary space, the paper's r. Steps are about ``sqrt(directions / n)`` as long as those of
            `AdamW`; ``scale`` makes up for it.
        **project: ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        directions: int = 16,
        **project: Any,
    ) -> None:
        super().__init__(
            params, ApolloRule(positive_int("directions", directions)), project,
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True,
        )  # fmt: skip


class Sketchy(GrassOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """Sketchy (arXiv 2302.03764) in the compact space, a full-matrix preconditioner along the features from a sketch of small
    rank; the dense rest through ``torch.optim.AdamW``.

    ``state[p]`` of a projected weight holds ``exp_avg`` (``[r, n]`` or ``[m, r]``), the ``sketch`` that rows have in common
    (``[size, n]`` or ``[size, m]``), and two numbers, ``escaped`` and ``total``.

    Args:
        params: as of `AdamW`.
        lr: learning rate: of projected weights about the largest singular value of an update.
        betas: decay rates of the first moment and of the sketch.
        eps: added to the root.
        weight_decay: decoupled weight decay, on the whole weight.
        size: of the sketch.
        **project: ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        size: int = 16,
        **project: Any,
    ) -> None:
        super().__init__(
            params, SketchyRule(positive_int("size", size)), project,
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True,
        )  # fmt: skip


class Muon(GrassOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """Muon in the compact space: the momentum of the selected rows, orthogonalized; the dense rest through ``torch.optim.AdamW``.

    ``state[p]`` of a projected weight holds ``momentum_buffer`` (``[r, n]`` or ``[m, r]``): half of `AdamW`'s bytes. At full
    rank a projected weight moves as with ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``.

    Args:
        params: as of `AdamW`.
        lr: learning rate; the update of a projected weight has a root mean square of about ``0.2 lr``.
        momentum: decay rate of the momentum; may change at any time without a recompilation.
        nesterov: whether the momentum looks ahead by one gradient.
        ns_steps: Newton-Schulz iterations.
        betas: of the dense rest's moments.
        eps: of the dense rest.
        weight_decay: decoupled weight decay, on the whole weight.
        **project: ``rank`` and the other keywords of `AdamW` from there on.

    Raises:
        ConfigError: as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **project: Any,
    ) -> None:
        self._momentum = momentum
        rule = MuonRule(bool(nesterov), positive_int("ns_steps", ns_steps))
        super().__init__(params, rule, project, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of `AdamW`; ``momentum``, of which torch's AdamW knows nothing, is a keyword of a group like the others.

        Raises:
            ConfigError: as of `AdamW`; a momentum outside of [0, 1).
        """
        self.defaults.setdefault("momentum", self._momentum)
        momentum = param_group.get("momentum", self._momentum)
        if not 0.0 <= finite("Muon: momentum", momentum) < 1.0:
            raise ConfigError(f"Muon: momentum must be in [0, 1), got {momentum!r}.")
        super().add_param_group(param_group)


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
        super().__init__(
            params, SGDRule(momentum != 0, nesterov), project,
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, foreach=True,
        )  # fmt: skip


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
        super().__init__(
            params, AdafactorRule(), project,
            lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, foreach=True,
        )  # fmt: skip


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
        if taken := sorted(RESERVED & set(rule.state_names)):
            raise ConfigError(f"{type(rule).__name__}: the state name {taken[0]!r} is taken; choose another one.")
        defaults = {"weight_decay": 0.0, **rule.defaults}
        own = {key: value for key, value in keywords.items() if key not in defaults}
        chosen = {**defaults, **{key: value for key, value in keywords.items() if key in defaults}}
        _check_numbers(type(self).__name__, chosen)
        super().__init__(params, rule, own, defaults=chosen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of `AdamW`; here the state of dense parameters is ours too, and keeps its dtypes, which torch would turn into the
        parameter's.

        Raises:
            StateError: as of `AdamW`.
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
        """One dense parameter, seen as a matrix of which all rows are selected; a vector is a single row."""
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

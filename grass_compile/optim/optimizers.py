"""The optimizers: each a ``torch.optim.Optimizer`` whose linear weights move inside the compiled backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..checks import finite, positive_int
from ..errors import ConfigError
from ..keywords import ProjectKeywords
from .optimizer import Optimizer, TorchRest
from .rules import AdafactorRule, AdamW8bitRule, AdamWRule, LionRule, MuonRule, SGDRule
from .rules.contrib import ApolloRule, SketchyRule


class AdamW(TorchRest, torch.optim.AdamW):
    """AdamW with structured sparse gradients (Grass, arXiv 2406.17660), fused into the compiled backward.

    Each linear weight has a gradient ``m x n``; only ``rank`` of its rows or columns are ever computed. The moments have that
    size, and only these rows or columns of the weight move until the next refresh chooses others. Everything else is trained by
    ``torch.optim.AdamW``, whose arguments keep their names, order and defaults. With ``rank`` equal to the weight's size along
    ``axis`` training equals ``torch.optim.AdamW`` to rounding.

    ``state[p]`` of a projected weight holds ``index`` (``int64[r]``), ``row_scale`` (``[r]``), ``exp_avg`` and ``exp_avg_sq``
    (``[r, n]`` for rows, ``[m, r]`` for columns; transposed for a weight that is stored in x out), ``step`` (updates since the
    moments were last zero; per row with ``on_refresh="carry"``), ``updates`` (updates in all), ``nonfinite`` (how many of
    them were skipped, ``int32[1]``) and ``axis``. With a dense projection, ``basis`` (``[m, r]``, ``[n, r]`` for columns) or
    ``key`` (``int64[2]``) takes the place of the first two.

    Args:
        params: ``model.named_parameters()`` (the names serve ``exclude`` and messages), ``parameters()``, or groups; a group may
            override any keyword.
        lr: learning rate; may change at any time without a recompilation.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        amsgrad: refused if True, as are ``maximize``, ``capturable`` and ``differentiable``.
        maximize: see ``amsgrad``.
        foreach: for the dense rest; None chooses.
        capturable: see ``amsgrad``.
        differentiable: see ``amsgrad``.
        fused: for the dense rest.
        **project: ``rank``, ``axis``, ``selection``, ``update_proj_gap`` and the rest of `grass_compile.keywords`; each has
            a line in docs/options.md.

    Raises:
        ConfigError: an argument is out of range, unknown, or not available in this version.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        refuse(self, amsgrad=amsgrad, maximize=maximize, capturable=capturable, differentiable=differentiable)
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, AdamWRule(), project, **numbers, **dense_flags(foreach, fused))


class AdamW8bit(TorchRest, torch.optim.AdamW):
    """AdamW in the compact space with moments of 8 bits; the dense rest through ``torch.optim.AdamW``, with moments in full.

    ``state[p]`` of a projected weight holds the codes ``exp_avg`` (``int8``) and ``exp_avg_sq`` (``uint8``), ``[r, n]`` or
    ``[m, r]``, and the largest magnitude of each block of 128 features of a row, ``exp_avg_max`` and ``exp_avg_sq_max``,
    ``[r, ceil(n / 128)]`` or ``[r, ceil(m / 128)]``: 2.06 bytes for an element where `AdamW` has 8. `AdamW8bitRule` in
    ``grass_compile.optim.rules`` says what the codes stand for, and their errors.

    Args:
        params: as for `AdamW`, like all other arguments except ``state_dtype``, which is refused.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        amsgrad: refused if True, as are ``maximize``, ``capturable`` and ``differentiable``.
        maximize: see ``amsgrad``.
        foreach: for the dense rest; None chooses.
        capturable: see ``amsgrad``.
        differentiable: see ``amsgrad``.
        fused: for the dense rest.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        refuse(self, amsgrad=amsgrad, maximize=maximize, capturable=capturable, differentiable=differentiable)
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, AdamW8bitRule(), project, **numbers, **dense_flags(foreach, fused))


class Apollo(TorchRest, torch.optim.AdamW):
    """APOLLO (arXiv 2412.05270) in the compact space, a learning rate for each selected row; the dense rest through
    ``torch.optim.AdamW``, as in the paper.

    ``state[p]`` of a projected weight holds Adam's moments in the auxiliary space, ``exp_avg`` and ``exp_avg_sq`` (``[r,
    directions]``), and ``norm``, the norm of the last update: a few numbers for each row.

    Args:
        params: as for `AdamW`.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, on the whole weight.
        directions: rank of the auxiliary space, the paper's r. Steps are about ``sqrt(directions / n)`` as long as those of
            `AdamW`; ``scale`` makes up for it.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        directions: int = 16,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, ApolloRule(positive_int("directions", directions)), project, **numbers, foreach=True)


class Sketchy(TorchRest, torch.optim.AdamW):
    """Sketchy (arXiv 2302.03764) in the compact space, a full-matrix preconditioner along the features from a sketch of small
    rank; the dense rest through ``torch.optim.AdamW``.

    ``state[p]`` of a projected weight holds ``exp_avg`` (``[r, n]`` or ``[m, r]``), the ``sketch`` that rows have in common
    (``[size, n]`` or ``[size, m]``), and two numbers, ``escaped`` and ``total``.

    Args:
        params: as for `AdamW`.
        lr: learning rate: of projected weights about the largest singular value of an update.
        betas: decay rates of the first moment and of the sketch.
        eps: added to the root.
        weight_decay: decoupled weight decay, on the whole weight.
        size: of the sketch.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        size: int = 16,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, SketchyRule(positive_int("size", size)), project, **numbers, foreach=True)


class Muon(TorchRest, torch.optim.AdamW):
    """Muon in the compact space: the momentum of the selected rows, orthogonalized; the dense rest through ``torch.optim.AdamW``.

    ``state[p]`` of a projected weight holds ``momentum_buffer`` (``[r, n]`` or ``[m, r]``): half of `AdamW`'s bytes. At full
    rank a projected weight moves as with ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, whose arguments have the same
    names, order and defaults here.

    Args:
        params: as for `AdamW`.
        lr: learning rate; the update of a projected weight has a root mean square of about ``0.2 lr``.
        weight_decay: decoupled weight decay, on the whole weight, of the dense rest too.
        momentum: decay rate of the momentum; may change at any time without a recompilation.
        nesterov: whether the momentum looks ahead by one gradient.
        ns_coefficients: of the Newton-Schulz iteration.
        eps: the least norm that the momentum is divided by before the iteration.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: only ``"match_rms_adamw"`` (torch's own default is ``"original"``).
        betas: of the dense rest's moments.
        dense_eps: of the dense rest; the parameter groups call it ``eps``, which is what ``torch.optim.AdamW`` reads.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        dense_eps: float = 1e-8,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        if adjust_lr_fn != "match_rms_adamw":
            raise ConfigError(
                f"Muon: adjust_lr_fn={adjust_lr_fn!r} is not available: the update has the size of AdamW's, whatever the shape. "
                "Leave it out, or give 'match_rms_adamw'."
            )
        if len(ns_coefficients) != 3:
            raise ConfigError(f"Muon: ns_coefficients must be three numbers, got {ns_coefficients!r}.")
        a, b, c = (finite("Muon: ns_coefficients", number) for number in ns_coefficients)
        if finite("Muon: eps", eps) <= 0:
            raise ConfigError(f"Muon: eps must be above 0, got {eps!r}.")
        self._momentum = momentum
        rule = MuonRule(bool(nesterov), positive_int("Muon: ns_steps", ns_steps), (a, b, c), float(eps))
        numbers = dict(lr=lr, betas=betas, eps=dense_eps, weight_decay=weight_decay)
        super().__init__(params, rule, project, **numbers, foreach=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for `AdamW`; ``momentum``, which torch's AdamW does not know, is a keyword of a group like the others.

        Raises:
            ConfigError: as for `AdamW`; a momentum outside of [0, 1).
        """
        self.defaults.setdefault("momentum", self._momentum)
        momentum = param_group.get("momentum", self._momentum)
        if not 0.0 <= finite("Muon: momentum", momentum) < 1.0:
            raise ConfigError(f"Muon: momentum must be in [0, 1), got {momentum!r}.")
        super().add_param_group(param_group)


class SGD(TorchRest, torch.optim.SGD):
    """SGD with momentum in the compact space; the dense rest through ``torch.optim.SGD``, whose arguments keep their names,
    order and defaults.

    ``state[p]`` of a projected weight holds ``momentum_buffer`` if there is momentum. Weight decay is added to the gradient, of
    projected weights to that of the selected rows.

    Args:
        params: as for `AdamW`.
        lr: learning rate.
        momentum: factor on the buffer.
        dampening: what a gradient lacks in the buffer.
        weight_decay: the L2 penalty.
        nesterov: Nesterov's momentum.
        maximize: refused if True, as is ``differentiable``.
        foreach: for the dense rest; None chooses.
        differentiable: see ``maximize``.
        fused: for the dense rest.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        refuse(self, maximize=maximize, differentiable=differentiable)
        numbers = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, SGDRule(momentum != 0, nesterov), project, **numbers, **dense_flags(foreach, fused))


class Adafactor(TorchRest, torch.optim.Adafactor):
    """Adafactor in the compact space; the dense rest through ``torch.optim.Adafactor``, whose arguments keep their names, order
    and defaults.

    ``state[p]`` of a projected weight holds ``row_var`` (``[r]``) and ``col_var`` (``[n]``, ``[m]`` for columns): the state of
    a weight is a few vectors.

    Args:
        params: as for `AdamW`.
        lr: an upper bound of the relative step size.
        beta2_decay: the exponent by which the second moment's memory grows.
        eps: a floor for squares, None for fp32's epsilon, and one for the size of the weight.
        d: an upper bound of the update's root mean square.
        weight_decay: decoupled weight decay, on the whole weight.
        foreach: for the dense rest; None chooses.
        maximize: refused if True.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        refuse(self, maximize=maximize)
        numbers = dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay)
        super().__init__(params, AdafactorRule(), project, **numbers, **dense_flags(foreach))


class Lion(Optimizer):
    """Lion (arXiv 2302.06675) in the compact space and for the dense rest.

    Args:
        params: as for `AdamW`.
        lr: learning rate.
        betas: of the interpolation and of the momentum.
        weight_decay: decoupled weight decay, on the whole weight.
        **project: ``rank`` and the rest of `grass_compile.keywords`.

    Raises:
        ConfigError: as for `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **project: Unpack[ProjectKeywords],
    ) -> None:
        super().__init__(params, LionRule(), lr=lr, betas=betas, weight_decay=weight_decay, **project)


def refuse(optimizer: Optimizer, **flags: bool) -> None:
    """Refuse flags of torch that would hold for the dense rest and not for projected weights.

    Raises:
        ConfigError: naming the first that is set.
    """
    for flag, value in flags.items():
        if value:
            raise ConfigError(
                f"{type(optimizer).__name__}: {flag}={value!r} is not available: the step of projected weights does not know it. "
                "Leave it out, or use the optimizer of torch.optim."
            )


def dense_flags(foreach: bool | None, fused: bool | None = None) -> dict[str, Any]:
    """How torch's own code steps the dense rest: all of it at once, unless somebody has another wish."""
    if fused is None:
        return {"foreach": True if foreach is None else foreach}
    return {"foreach": foreach, "fused": fused}

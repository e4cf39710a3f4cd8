"""APOLLO (Zhu et al., arXiv 2412.05270), on a compact gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....math.noise import gaussian
from ....math.rule import StateLayout
from ..adamw import AdamWRule


@dataclasses.dataclass(frozen=True)
class ApolloRule(AdamWRule):
    """Each selected row of the gradient, scaled as Adam would scale it in a space of a few random directions.

    Algorithm 1 of the paper with the selected rows as channels: ``R = C P``, ``P [n, k]`` Gaussian of variance ``1 / k``; Adam's
    moments of ``R``; row ``i`` of ``C`` times ``|adam(R)[i]| / |R[i]|``. ``P`` is made anew from the seed in every step, and is
    the same in all of them (the paper draws another one every 200 steps). The norm of the whole update before the learning rate
    grows by at most a factor per step (the norm-growth limiter of Fira, arXiv 2410.01623); the first after a reset is free. The
    step of a row is about ``sqrt(k / n)`` as long as Adam's, for which the keyword ``scale`` can make up, as the paper's does.

    Attributes:
        directions: k, the rank of the auxiliary space.
        growth: of the norm, from one step to the next; infinity for no limit.
        seed: of the directions.
    """

    directions: int = 16
    growth: float = 1.01
    seed: int = 0

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "norm")
    state_layout: ClassVar[Mapping[str, StateLayout]] = {"exp_avg": "selected", "exp_avg_sq": "selected", "norm": "whole"}
    defaults: ClassVar[Mapping[str, Any]] = {**AdamWRule.defaults, "eps": 1e-6, "weight_decay": 0.0}

    def width(self, name: str, features: int) -> int | None:
        """One number for each direction."""
        return None if name == "norm" else self.directions

    def projection(self, features: int, like: Tensor) -> Tensor:
        """``P``, ``[n, k]``, in the dtype and on the device of ``like``."""
        return gaussian(torch.arange(2, device=like.device) + self.seed, features, self.directions, like.dtype)

    def update(
        self, compact_grad: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As the authors' ``apollo_torch`` has it: the bias corrections scale the update, after the limiter."""
        projected = compact_grad @ self.projection(compact_grad.shape[1], compact_grad)
        exp_avg = hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * projected
        exp_avg_sq = hyper["beta2"] * state["exp_avg_sq"] + hyper["one_minus_beta2"] * (projected * projected)
        adam = exp_avg / (exp_avg_sq.sqrt() + hyper["eps"])
        scaled = compact_grad * (_norm(adam, 1) / (_norm(projected, 1) + 1e-8))
        norm, before = _norm(scaled, (0, 1)), state["norm"]
        limit = torch.where(before > 0, self.growth * (before + 1e-8) / norm, 1.0).clamp(max=1.0)
        correction1 = -torch.expm1(state["step"] * hyper["log_beta1"])
        correction2 = -torch.expm1(state["step"] * hyper["log_beta2"])
        step_size = limit * hyper["lr"] * correction2.sqrt() / correction1
        return step_size * scaled, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "norm": norm * limit}


def _norm(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return (tensor * tensor).sum(dim, keepdim=True).sqrt()

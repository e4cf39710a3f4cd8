"""Grass in eager PyTorch, straight from the formulas: the oracle that the compiled path is tested against.

It forms every full gradient, keeps nothing clever, and shares no code with the traced step. Grass (arXiv 2406.17660,
Algorithm 1) for selections with unit row scale: ``C = G[idx]``, Adam on ``C``, ``W[idx] -= lr * scale * update``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


@dataclasses.dataclass
class CompactState:
    """The state of one projected weight; ``steps`` counts per row, all rows alike unless they are carried."""

    index: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor


class ReferenceAdamW:
    """AdamW on ``C = G[idx]`` for the projected weights and on ``G`` for the others.

    Args:
        named_parameters: names and parameters; ``step`` reads ``.grad``.
        projected: for each projected name, the stored dimension to select along, and the rank.
        lr: learning rate; the attribute may be changed between steps.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on the whole weight.
        update_proj_gap: steps between refreshes.
        on_refresh: ``reset``, ``carry`` or ``keep``.
        scale: a factor on the update of projected weights.
        selection: ``top``, ``norm`` or ``uniform``.
        noise: for a name and a number of updates, uniform numbers, one for each row.
        offsets: steps by which the refreshes of a name come early.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        projected: Mapping[str, tuple[int, int]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_proj_gap: int = 200,
        on_refresh: str = "reset",
        scale: float = 1.0,
        selection: str = "top",
        noise: Callable[[str, int], Tensor] | None = None,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.parameters = dict(named_parameters)
        self.projected = dict(projected)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.update_proj_gap, self.on_refresh, self.scale = update_proj_gap, on_refresh, scale
        self.selection, self.noise, self.offsets = selection, noise, dict(offsets or {})
        self.updates = 0
        self.state: dict[str, CompactState] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its ``.grad``, and clear it."""
        for name, weight in self.parameters.items():
            if weight.grad is None:
                continue
            wide = torch.promote_types(weight.dtype, torch.float32)
            if name in self.projected:
                self._projected_step(name, weight, weight.grad, wide)
            else:
                self._dense_step(name, weight, weight.grad.to(wide))
            weight.grad = None
        self.updates += 1

    def _projected_step(self, name: str, weight: Tensor, gradient: Tensor, wide: torch.dtype) -> None:
        dim, rank = self.projected[name]
        if self.due(name):
            self.state[name] = self._refreshed(name, gradient.to(wide), dim, rank)
        state = self.state[name]
        update = self._adam(state, gradient.index_select(dim, state.index).to(wide), dim)
        weight.mul_(1 - self.lr * self.weight_decay)
        for row, index in enumerate(state.index.tolist()):
            old = weight.select(dim, index)
            old.copy_(old.to(wide) - self.lr * self.scale * update.select(dim, row))

    def due(self, name: str) -> bool:
        """Whether a weight chooses new rows at this step."""
        return self.updates == 0 or (self.updates + self.offsets.get(name, 0)) % self.update_proj_gap == 0

    def _chosen_rows(self, name: str, gradient: Tensor, dim: int, rank: int) -> Tensor:
        """``rank`` rows, ascending.

        Drawing distinct rows one after another, with probabilities in proportion to weights, is a race that each row finishes
        after an exponential time of rate ``weight`` (Efraimidis and Spirakis, 2006)."""
        norms = torch.stack([row.norm() for row in gradient.unbind(dim)])
        if self.selection == "top":
            order = norms.argsort(descending=True)
        else:
            assert self.noise is not None
            weights = norms ** {"norm": 1, "uniform": 0}[self.selection]
            order = (-self.noise(name, self.updates)[: len(norms)].log() / weights).argsort()
        return order[:rank].sort().values

    def _refreshed(self, name: str, gradient: Tensor, dim: int, rank: int) -> CompactState:
        """The state of new rows; with ``carry``, rows that stay keep their moments, with ``keep`` the slots do."""
        old = self.state.get(name)
        index = self._chosen_rows(name, gradient, dim, rank)
        if old is not None and self.on_refresh == "keep":
            return dataclasses.replace(old, index=index)
        compact = torch.zeros_like(gradient.index_select(dim, index))
        new = CompactState(index, compact, compact.clone(), torch.zeros(rank))
        if old is not None and self.on_refresh == "carry":
            positions = {row: position for position, row in enumerate(old.index.tolist())}
            for position, row in enumerate(index.tolist()):
                if row in positions:
                    new.exp_avg.select(dim, position).copy_(old.exp_avg.select(dim, positions[row]))
                    new.exp_avg_sq.select(dim, position).copy_(old.exp_avg_sq.select(dim, positions[row]))
                    new.steps[position] = old.steps[positions[row]]
        return new

    def _dense_step(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        if name not in self.state:
            zeros = torch.zeros_like(gradient)
            self.state[name] = CompactState(torch.empty(0), zeros, zeros.clone(), torch.zeros(()))
        update = self._adam(self.state[name], gradient, None)
        weight.mul_(1 - self.lr * self.weight_decay)
        weight.copy_(weight.to(update.dtype) - self.lr * update)

    def _adam(self, state: CompactState, gradient: Tensor, dim: int | None) -> Tensor:
        """``m_hat / (sqrt(v_hat) + eps)``, the bias correction in double precision."""
        beta1, beta2 = self.betas
        state.steps += 1
        state.exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        state.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps = state.steps.double() if dim is None else state.steps.double().unsqueeze(1 - dim)
        corrected1 = state.exp_avg / (1 - beta1**steps).to(gradient.dtype)
        corrected2 = state.exp_avg_sq / (1 - beta2**steps).to(gradient.dtype)
        return corrected1 / (corrected2.sqrt() + self.eps)

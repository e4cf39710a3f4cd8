"""The optimizers of the demo's runs: torch's own over all of the model, or ours over the linear layers of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

import grass_compile
from grass_compile.optim.rules.muon import iteration_dtype

if TYPE_CHECKING:
    from training import TrainConfig


class DenseMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for the hidden matrices and `torch.optim.AdamW` for the rest, to a loop as one optimizer.

    Its groups are those of both, as the same dicts, so that a schedule reaches them; so is its state.

    Args:
        matrices: parameter groups for Muon, each with its `lr`. An update has a root mean square of about `0.2 lr`, whatever
            the matrix's shape, as with `grass_compile.Muon`. Like that one, it iterates in fp32 on a CPU without bf16, where it
            would take ten times as long.
        rest: the parameter group for AdamW.
    """

    def __init__(self, matrices: list[dict[str, Any]], rest: dict[str, Any]) -> None:
        muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([rest], weight_decay=0.0, fused=True)
        self.parts = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with mock.patch.object(Tensor, "bfloat16", lambda matrix: matrix.to(iteration_dtype(matrix.device))):
            for part in self.parts:
                part.step()


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """`config.optimizer`: torch's own where `config.rank` is None, else ours."""
    if config.rank is None and config.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)

    rates = dict(lr=config.lr, dense_lr=config.dense_lr, query_key_factor=config.query_lr_factor)
    if config.rank is None:
        groups = grass_compile.param_groups(model, **rates)
        *matrices, rest = [{"params": [p for _, p in group["params"]], "lr": group["lr"]} for group in groups]
        return DenseMuon(matrices, rest)

    keywords = dict(axis=config.axis, on_refresh=config.on_refresh, selection=config.selection, stagger=config.stagger)
    groups = grass_compile.param_groups(model, **rates, **keywords)
    grass = getattr(grass_compile, config.optimizer)
    own = dict(rank=config.rank, update_proj_gap=config.update_proj_gap, seed=config.seed)
    return grass(groups, lr=config.lr, weight_decay=0.0, **own)  # type: ignore[no-any-return]

"""One optimizer step on one weight, as pure functions over tensors. The pass `fuse` traces them into the backward graph.

Grass (arXiv 2406.17660), Algorithm 1, for a selection with unit row scale: ``C = G[idx]``,
``(state, update) = rule(C, state)``, ``W[idx] -= scale * update``.

Both functions take ``(config, dim, rank, gradient, weight, hyper, index, step, *rule_state)`` and return the new value of
every tensor that changes, the weight first. ``dim`` is the stored dimension of the weight that ``index`` selects along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .ops import refresh, row_update

if TYPE_CHECKING:
    from ..config import SiteConfig

SHARED_HYPER = ("decay", "step")
"""The last elements of ``hyper``: ``1 - lr * weight_decay``, the factor on the whole weight; and, where all rows of a weight
have had equally many updates, their number, this one included. Weights that share it share all that follows from it."""


def regular_step(
    config: SiteConfig, dim: int, rank: int, compact_grad: Tensor, weight: Tensor, hyper: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """A step with the rows that the last refresh chose.

    Args:
        config: what the optimizer asked of this weight.
        dim: the stored dimension that is indexed.
        rank: r.
        compact_grad: ``[r, n]`` or ``[m, r]``.
        weight: ``[m, n]``.
        hyper: ``[len(rule.hyper_names) + len(SHARED_HYPER)]``.
        *state: as named by `graph_state`.

    Returns:
        weight, and what is left of the state after ``index``, all new.
    """
    index, *rest = state
    return _apply(config, dim, compact_grad, weight, hyper, index, rest)


def refresh_step(
    config: SiteConfig, dim: int, rank: int, gradient: Tensor, weight: Tensor, hyper: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """A step that first chooses new rows from the full gradient, then resets or carries the state.

    Args:
        gradient: ``[m, n]``, full; everything else as in `regular_step`.

    Returns:
        weight, and the state as named by `graph_state`, all new.
    """
    index, *rest = state
    compact_grad, index, *rest = refresh(gradient, index, rest, dim, rank, config.on_refresh)
    new_weight, *rest = _apply(config, dim, compact_grad, weight, hyper, index, rest)
    return (new_weight, index, *rest)


def graph_state(config: SiteConfig) -> tuple[str, ...]:
    """The state tensors of one weight that are inputs of the graph, in their order there.

    ``step`` is among them only where it is kept per row; otherwise it comes with ``hyper``.
    """
    return ("index", *(("step",) if config.on_refresh == "carry" else ()), *config.rule.state_names)


def _apply(
    config: SiteConfig,
    dim: int,
    compact_grad: Tensor,
    weight: Tensor,
    hyper: Tensor,
    index: Tensor,
    state: list[Tensor],
) -> tuple[Tensor, ...]:
    rule = config.rule
    numbers = dict(zip((*rule.hyper_names, *SHARED_HYPER), hyper.unbind(), strict=True))
    written = []
    step = numbers["step"]
    if config.on_refresh == "carry":
        counted, *state = state
        written = [counted + 1]
        step = written[0].to(hyper.dtype).unsqueeze(1 - dim)
    named = dict(zip(rule.state_names, state, strict=True))
    update, new = rule.update(compact_grad.to(state[0].dtype), {**named, "step": step}, numbers)
    if config.scale != 1.0:
        update = update * config.scale
    if config.decays:
        weight = (weight * numbers["decay"]).to(weight.dtype)
    return (row_update(weight, dim, index, -update), *written, *(new[name] for name in rule.state_names))

"""Which tensors and numbers a compiled step takes, by name and in order: what passes and runtime agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .projection import SELECTORS
from .rule import Rule
from .selection import DRAWN_BY_SCORE

if TYPE_CHECKING:
    from ..config import SiteConfig

SHARED_HYPER = ("decay", "step", "seed", "max_norm")
"""The last elements of ``hyper``: ``1 - lr * weight_decay``, the factor on the whole weight; where the host counts the updates
of the moments, their number, this one included; where rounding is stochastic, the seed of this step's; and where gradients are
clipped, the largest norm allowed."""


Action = Literal["step", "choose", "keep", "skip"]
"""The use that a backward makes of one weight's gradient: ``step`` moves the weight; ``keep`` leaves the compact gradient for
``opt.step()``; ``choose`` (on a refresh) chooses new rows first, and then leaves their gradient; ``skip`` does nothing, since the
backward is not for the weights."""


def step_state(config: SiteConfig) -> tuple[str, ...]:
    """The state tensors of one weight that a step reads, in their order; it writes all but the first.

    ``square_sum`` is where it leaves the squared norm of the compact gradient; that is no part of an optimizer's state.

    ``step`` is among them only where the step counts it (`SiteConfig.counted`); otherwise it comes with ``hyper``.
    """
    return (SELECTORS[config.projection], "square_sum", *(("nonfinite",) if config.checked else ()), *settled_state(config))


def settled_state(config: SiteConfig) -> tuple[str, ...]:
    """Those that belong to the rows: a refresh resets, carries or keeps them."""
    return (*(("step",) if config.counted else ()), *config.rule.state_names)


def layout_of(rule: Rule, name: str) -> str:
    """The `StateLayout` of a tensor of `step_state`."""
    return "selected" if name == "step" else rule.layout(name)


def graph_state(config: SiteConfig) -> tuple[str, ...]:
    """The inputs of a compiled region for one weight: `step_state`, the noise that draws new rows if any is needed, and, if it
    proposes rows to take next, where it puts them, and whether they are due if every step's graph can propose."""
    noise, proposed, due = config.selection in DRAWN_BY_SCORE, config.scores != "exact", config.scores == "estimate"
    return (*step_state(config), *(("noise",) * noise), *(("proposed",) * proposed), *(("due",) * due))

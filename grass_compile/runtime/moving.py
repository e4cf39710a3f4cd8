"""What `grass_compile.distributed.DiLoCo` asks of one weight."""

from __future__ import annotations

from ..distributed.moving import Moving
from ..errors import ConfigError
from .parameter import ProjectedParameter


def check_blind(record: ProjectedParameter) -> None:
    """Refuse rows that workers with other batches would choose otherwise.

    Raises:
        ConfigError: they are chosen by the gradient.
    """
    options = record.options
    can = options.rank is not None and record.parameter.dim() == 2 and record.refusal(record.name, False) is None
    if can and options.projection == "grass" and not options.blind:
        raise ConfigError(
            f"{record.label}: selection={options.selection!r} chooses its rows by the gradient, which is another on each "
            "worker, so that each would move other rows. Use selection='uniform', or DiLoCo(sparse=False), which sends whole "
            "weights."
        )


def moved_last(record: ProjectedParameter) -> Moving | None:
    """What the last step has moved; None if that is all of the weight."""
    state = record.optimizer_state()
    if record.assigned is None or "index" not in state:
        return None
    decays = record.config().decays and not record.rule.coupled_decay
    return Moving(record.assigned.dim, state["index"], state["updates"], decays, state["nonfinite"])

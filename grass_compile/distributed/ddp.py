"""``DistributedDataParallel``: projected weights leave its reducer, and their compact gradients are averaged inside the backward.

What is projected is known in the first forward of a compiled region, which runs inside DDP's own. There the reducer is built
anew from what is left; a communication hook would come too late, since the buckets that it sees hold whole gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .layout import Layout, MeshDim


def active() -> Any:
    """The ``DistributedDataParallel`` module whose forward is running, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._active_ddp_module


def syncs(ddp: Any) -> bool:
    """Whether the backward of the forward that is running is to average gradients: not under ``no_sync()``."""
    return bool(ddp.require_backward_grad_sync)


def layout_of(ddp: Any) -> Layout:
    """How this module spreads its weights.

    Raises:
        ConfigError: it is used in a way that is not supported.
    """
    for feature, used in (
        ("static_graph=True", ddp.static_graph),
        ("mixed_precision=", ddp.mixed_precision is not None),
        ("delay_all_reduce_named_params=", bool(ddp._delay_all_reduce_params)),
        ("join() for uneven inputs", ddp._join_config.enable),
        ("the Python reducer (torch._dynamo.config.optimize_ddp='python_reducer')", ddp._use_python_reducer),
    ):
        if used:
            raise ConfigError(f"DistributedDataParallel with {feature} is not supported: leave that out, or use another backend.")
    return Layout((ranks_of(ddp),))


def ranks_of(ddp: Any) -> MeshDim:
    """The ranks that train this module."""
    return MeshDim(ddp.process_group.group_name, ddp.process_group.size())


def take_out(ddp: Any, parameters: Iterable[Tensor]) -> None:
    """Build the reducer anew without some parameters, inside DDP's forward. What is out already stays out."""
    ours = {id(parameter) for parameter in parameters}
    names = {  # as DDP spells them: every name of a shared parameter, and a dot before those of the root
        f"{path}.{name}"
        for path, module in ddp.module.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in ours
    }
    if names <= ddp.parameters_to_ignore:
        return
    ddp.parameters_to_ignore |= names
    left, expect_sparse = ddp._build_params_for_reducer()
    ddp._module_parameters = left
    if not left:  # as for a module all of whose parameters are ignored from the start
        ddp._delay_all_reduce_all_params = True
        return
    hooks = list(ddp._comm_hooks)
    ddp._ddp_init_helper(left, expect_sparse, ddp._build_debug_param_to_name_mapping(left), ddp.static_graph)
    ddp._comm_hooks = []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()

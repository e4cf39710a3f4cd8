"""`grass_compile.explain` for a model that has no memory: which of its weights are projected, and why."""

from __future__ import annotations

import warnings

from .. import _simulate
from ..errors import ConfigError
from ..explain import explain
from ..report import Report
from .models import as_fake, unnoticed
from .request import Request, dtype_of, factory, loaded, step_inputs


def examine(request: Request) -> Report:
    """Say for each parameter of a model whether it is projected, how, and why; nothing is compiled, and nothing has memory.

    Args:
        request: as for a plan; its optimizer has to be one of this package.

    Raises:
        ConfigError: no such model, optimizer or keyword.
    """
    model = loaded(request)
    with unnoticed(), warnings.catch_warnings(), _simulate.fake(_simulate.SimulationMode({})):
        warnings.simplefilter("ignore")
        shadow = as_fake(model, dtype_of(request)).train()
        optimizer = factory(request)(shadow)
        report = explain(shadow, optimizer=optimizer, **step_inputs(request))  # type: ignore[arg-type]
    if not report.projected:
        raise ConfigError(f"nothing of {request.model} is projected:\n{report}")
    return report

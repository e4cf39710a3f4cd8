"""This package's optimizer in its modes. With every row selected it must train as ``torch.optim.AdamW`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grass_compile.conformance.loop import WIDTH, trainable
from grass_compile.conformance.subjects.registry import SUBJECTS, subject

RATE = 1e-2
DECAY = 0.1
ORACLE = SUBJECTS["torch.optim.AdamW"]


def _compiled(**options: Any) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def compile_(net: nn.Module) -> Callable[[Tensor], Tensor]:
        from grass_compile.backend import grass

        return torch.compile(net, backend=grass, options={"compiler": "aot_eager", **options})

    return compile_


def _grass(step_in_backward: bool | str) -> Callable[[nn.Module], Any]:
    def build(net: nn.Module) -> Any:
        import grass_compile

        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        keywords: dict[str, Any] = dict(step_in_backward=step_in_backward)
        return grass_compile.AdamW(named, lr=RATE, weight_decay=DECAY, rank=WIDTH, update_proj_gap=1000, **keywords)

    return build


for _mode, _value in (("auto", "auto"), ("fused", True), ("deferred", False)):
    subject(f"grass_compile.AdamW, {_mode}", package="grass-compile", compile=_compiled(), oracle=ORACLE)(_grass(_value))


@subject(
    "grass_compile, unmodified AdamW",
    package="grass-compile",
    compile=_compiled(rank=WIDTH, update_proj_gap=1000),
    oracle=ORACLE,
)
def unmodified(net: nn.Module) -> Any:
    """A script that keeps torch's optimizer and changes the line that compiles."""
    return torch.optim.AdamW(trainable(net), lr=RATE, weight_decay=DECAY)

"""``gather`` takes features at an index from one activation or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _inductor
from . import cpu
from .library import library, on_cpu

library.define("gather(Tensor[] features, Tensor[] index) -> Tensor")


def _gather(features: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    if features[0].element_size() == 1:  # torch gathers no float8
        return _gather_as_it_is([x.view(torch.uint8) for x in features], index).view(features[0].dtype)
    return _gather_as_it_is(features, index)


def _gather_as_it_is(features: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    pairs = zip(features, index, strict=True)
    if on_cpu(features[0]):  # `index_select` runs on one thread only
        return torch.cat([x.t().gather(0, rows.unsqueeze(1).expand(-1, x.shape[0])) for x, rows in pairs]).t()
    return torch.cat([x.gather(1, rows.expand(x.shape[0], -1)) for x, rows in pairs], 1)


def _gather_fake(features: Sequence[Tensor], index: Sequence[Tensor]) -> Tensor:
    tokens, rank = features[0].shape[0], sum(rows.shape[0] for rows in index)
    if on_cpu(features[0]):
        return features[0].new_empty((rank, tokens)).t()
    return features[0].new_empty((tokens, rank))


library.impl("gather", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("grass_compile::gather", _gather_fake)

gather = torch.ops.grass_compile.gather.default
"""``gather([features [b, m]], [index int64[r]]) -> [b, r]``; ``index`` must be in range. Several: side by side.

On a GPU token after token, so that neighbouring threads read neighbouring memory. On a CPU feature after feature, so that the
product of the transposed takes it as it is: oneDNN needs up to 1.5 times as long with a transposed operand in bf16."""

library.define("gather_on_cpu(Tensor[] features, Tensor[] index) -> Tensor")
library.impl("gather_on_cpu", cpu.gather, "CPU")
torch.library.register_fake("grass_compile::gather_on_cpu", _gather_fake)


@_inductor.lowering(gather)
def _lower(features: Any, index: Any) -> Any:
    """A loop without bounds checks on a GPU, an operator of its own on a CPU.

    On a CPU, Inductor puts neighbouring loops into one C++ function. A gather among them would make the model's own functions
    differ between the regular variant and the refresh, and the C++ compiler, which takes most of the time, would see them twice.
    """
    if features[0].get_device().type == "cpu":
        return _inductor.fallback(torch.ops.grass_compile.gather_on_cpu.default)(features, index)
    unchecked = _inductor.lowering_of(torch.ops.aten._unsafe_index.Tensor)
    gathered = [unchecked(source, [None, rows]) for source, rows in zip(features, index, strict=True)]
    return gathered[0] if len(gathered) == 1 else _inductor.lowering_of(torch.ops.aten.cat.default)(gathered, 1)

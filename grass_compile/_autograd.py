"""What this package needs of autograd beyond its public names: which nodes a backward will reach, who waits for a gradient, and
writes that nobody is to notice.

Nothing of ours is imported, so that any module may use this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def unversioned(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Inside, autograd does not see writes to ``tensors``, as it does not see those of generated code."""
    guard: contextlib.AbstractContextManager[None] = torch.autograd._unsafe_preserve_version_counter(  # type: ignore[attr-defined]
        tuple(tensors)
    )
    return guard


def without_autocast() -> contextlib.AbstractContextManager[None]:
    """Inside, products are computed in the dtype of their factors, whatever context a backward or a step was called in."""
    guard: contextlib.AbstractContextManager[None] = torch._C._DisableAutocast()
    return guard


def run_as_is(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """The default of a ``__torch_function__`` that has no answer of its own: results keep their own class."""
    return torch._C._disabled_torch_function_impl(func, types, args, kwargs)


def sequence_number() -> int:
    """Nodes of the autograd graph created from now on have at least this number."""
    return int(torch._C._autograd._get_sequence_nr())


def backward_node(values: Iterable[Any], since: int) -> Any:
    """The autograd node of a compiled function that was called after ``since`` was read, or None.

    Outputs that are views stand behind view nodes of their own, so the search goes up a few steps; outputs that alias an
    input lead to older nodes, which are passed over.
    """
    pending: list[Any] = [value.grad_fn for value in values if isinstance(value, Tensor)]
    while pending:
        node = pending.pop()
        if node is None or node._sequence_nr() < since:
            continue
        if "CompiledFunction" in node.name():
            return node
        pending.extend(parent for parent, _ in node.next_functions)
    return None


def graph_task() -> int:
    """The number of the backward that is running in this thread, or -1."""
    return int(torch._C._current_graph_task_id())


def will_run(node: Any) -> bool:
    """Whether the backward that is running will bring a gradient to the accumulator of a leaf, or hand that gradient out.

    It does not for ``torch.autograd.grad`` and ``backward(inputs=...)`` with other inputs.
    """
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad asks for it
        return True


def will_accumulate(node: Any) -> bool:
    """The same without ``torch.autograd.grad``, which hands the gradient out."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return False


class _Edges(torch.autograd.Function):
    """Computes nothing; its node has an edge to where the gradient of each input would go."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        return torch.empty(0, device="cpu")


def _user_of(leaves: Sequence[Tensor]) -> Any:
    """A tensor in a graph that takes all ``leaves``, in whatever mode this is called."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _user_of(leaves)
    with torch.enable_grad():
        return _Edges.apply(*leaves)  # type: ignore[no-untyped-call]


def accumulators(leaves: Sequence[Tensor]) -> list[Any]:
    """For each leaf, the autograd node that accumulates gradients into it, made if no graph holds it; None for a tensor that
    needs no gradient."""
    if not any(leaf.requires_grad for leaf in leaves):
        return [None] * len(leaves)
    user = _user_of(leaves)
    return [edge[0] for edge in user.grad_fn.next_functions]


def accumulator(leaf: Tensor) -> Any:
    """That of one leaf."""
    return accumulators([leaf])[0]


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that compiled code wrote these tensors, so that stale saved copies are noticed."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def have_hooks(parameters: Sequence[Tensor]) -> list[bool]:
    """For each parameter, whether user code waits for its full gradient: by a hook on it, or on the node that accumulates its
    gradient.

    Hooks of a node cannot be seen, but whoever has registered one has to hold the node's Python object to keep them alive.
    """
    leaves = [parameter for parameter in parameters if parameter.requires_grad and parameter.is_leaf]
    shared = dict(zip(map(id, leaves), _references(leaves), strict=True)) if leaves else {}
    return [
        bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)) or shared.get(id(p), 0) > _UNSHARED
        for p in parameters
    ]


def _references(leaves: Sequence[Tensor]) -> list[int]:
    """For each leaf, how many hold the Python object of the node that accumulates its gradient, a graph of our own kept alive
    meanwhile: a node that is in a graph holds its object too."""
    user = _user_of(leaves)
    return [sys.getrefcount(edge[0]) for edge in user.grad_fn.next_functions]


(_UNSHARED,) = _references([torch.zeros((), device="cpu", requires_grad=True)])


@contextlib.contextmanager
def kept_in_place(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, hooks on saved tensors (offloading, compression, checkpoints) never see ``tensors``: the backward gets these very
    tensors, and may write them, rather than copies."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        yield
        return
    pack, unpack = hooks
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def pack_unless_ours(tensor: Tensor) -> Any:
        return _InPlace(tensor) if tensor.untyped_storage().data_ptr() in addresses else pack(tensor)

    def unpack_unless_ours(packed: Any) -> Tensor:
        return packed.tensor if isinstance(packed, _InPlace) else unpack(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack_unless_ours, unpack_unless_ours):
        yield


@dataclasses.dataclass(frozen=True)
class _InPlace:
    tensor: Tensor

"""A GPU that is described rather than there: enough of one for Inductor to generate code for it.

The graphs cannot be traced on CUDA tensors without a GPU (a CPU build of torch has no autograd for them, not even for fake ones).
So they are traced on a CPU, and each forward and backward graph has its fake values moved to ``cuda:0`` when it reaches
Inductor. What Inductor does to a *joint* graph only for a GPU, padding of products for example, is not seen.
"""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    total_memory=141 << 30,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
"""A GPU of compute capability 9.0, in the words of ``torch.cuda.get_device_properties``; the described device by default."""

A100 = types.SimpleNamespace(
    **{
        **vars(H200),
        "name": "NVIDIA A100-SXM4-40GB",
        "major": 8,
        "multi_processor_count": 108,
        "shared_memory_per_block_optin": 166912,
        "total_memory": 40 << 30,
        "L2_cache_size": 40 << 20,
    }
)
"""One of 8.0."""

GPUS = {"H200": H200, "A100": A100}

_described: contextvars.ContextVar[types.SimpleNamespace] = contextvars.ContextVar("described", default=H200)


@contextlib.contextmanager
def describing(gpu: str) -> Iterator[None]:
    """Inside, in this thread, the described device is this one of `GPUS`."""
    token = _described.set(GPUS[gpu])
    try:
        yield
    finally:
        _described.reset(token)


class Driver:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        gpu = _described.get()
        return GPUTarget("cuda", gpu.major * 10 + gpu.minor, gpu.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0


def _caches() -> list[Callable[[], None]]:
    """What makes Inductor forget the device that it has asked."""
    from torch._inductor import utils
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils._triton import has_triton

    functions = [has_triton, DeviceProperties.create, *vars(utils).values()]
    return [function.cache_clear for function in functions if hasattr(function, "cache_clear")]


@contextlib.contextmanager
def described_device() -> Iterator[None]:
    """Make torch, Inductor and Triton believe in one GPU (see `describing`), as far as generating code goes; nothing can run."""
    from torch._decomp import decomposition_table
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import reinplace
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.runtime import driver

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _described.get(),
        "get_rng_state": torch.zeros(0, dtype=torch.uint8),
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            replacement = mock.Mock(return_value=answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
            if name in vars(CudaInterface):
                stack.enter_context(mock.patch.object(CudaInterface, name, replacement))
        # Generated modules import it by this name.
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", mock.Mock(), create=True))
        # What runs on fake tensors must not ask for the guard of a device that is not there, as copies do. Of both, the result
        # looks like the first argument.
        shapes = {torch.ops.aten._unsafe_masked_index_put_accumulate.default: lambda tensor, *_: torch.empty_like(tensor)}
        stack.enter_context(mock.patch.dict(decomposition_table, shapes))
        stack.enter_context(mock.patch.object(reinplace, "_inplace_generalized_scatter", lambda inp, src, view_ops: inp))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(mock.patch.object(triton_heuristics.CachingAutotuner, "_make_launchers"))
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        for forget in _caches():  # Dynamo and Inductor have asked before
            stack.callback(forget)
            forget()
        yield


def compile_for_described_device(gm: fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
    """Take the place of Inductor's ``compile_fx_inner``: generate code for the described device.

    Args:
        gm: a graph of fake values of a CPU, changed in place.
        example_inputs: its inputs, with the strides that the forward was compiled to return.
        **keywords: as ``compile_fx_inner`` has them.
    """
    from torch._inductor.compile_fx import compile_fx_inner

    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, torch.Tensor):
            node.meta["val"] = value
    with described_device():
        compiled: Callable[..., Any] = compile_fx_inner(gm, retarget(gm), **keywords)
    return compiled


def retarget(gm: fx.GraphModule) -> list[Any]:
    """Move the fake values of a graph to ``cuda:0``, and with them every ``device=`` argument. A truth value that goes in stays
    on the host, where the operators that read it look.

    Args:
        gm: a forward or backward graph made by AOTAutograd, changed in place.

    Returns:
        The fake inputs.
    """
    device = torch.device("cuda", 0)

    def moved(value: FakeTensor) -> torch.Tensor:
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    for node in gm.graph.nodes:
        value = node.meta.get("val")
        on_host = node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() == 0
        if value is not None and not on_host:
            node.meta["val"] = tree_map_only(FakeTensor, moved, node.meta["val"])
        node.kwargs = tree_map_only(torch.device, lambda _: device, node.kwargs)
    gm.recompile()
    return [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]

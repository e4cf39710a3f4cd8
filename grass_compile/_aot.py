"""Compiling graphs by AOTAutograd and Inductor, or op by op; what each of them needs to be told beyond its public arguments."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from functorch.compile import min_cut_rematerialization_partition as min_cut_rematerialization_partition  # type: ignore[import-untyped]
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only as tree_map_only

from . import _autograd, _dynamo, _inductor

Compiled = Callable[..., Any]


Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


CPP_LOOPS_ARE_SAFE = torch.__version__ >= "2.13"
"""Whether Inductor's C++ may lay loops out anew: in 2.11 a node to which that happens forgets which writes have to come after it
(``SchedulerNode.recompute_size_and_body``), and where an index divides the variable of a loop the code may not compile."""


class Partitioner(CustomPartitionerFn):
    """Hands the joint graph to ``function``. Pickles as its key alone.

    The graphs that ``function`` makes are part of Inductor's cache key themselves, so the key need only cover how they are
    lowered: the source of this package.
    """

    def __init__(self, function: Partition, key: str) -> None:
        self.function: Partition | None = function
        self.key = key

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        assert self.function is not None
        return self.function(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        return self.key

    def __getstate__(self) -> dict[str, Any]:
        return {"function": None, "key": self.key}


@dataclasses.dataclass(frozen=True)
class CompileContexts:
    """The contexts in which AOTAutograd calls a compiler, kept to compile under them later."""

    tracing: Any
    compile: Any

    @classmethod
    def current(cls) -> CompileContexts:
        """Those that are in force now."""
        return cls(copy.copy(TracingContext.try_get()), CompileContext.try_get())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, they are in force again, and neither autograd nor autocast is."""
        with tracing(self.tracing), compile_context(self.compile), torch._C._DisableAutocast(), torch.no_grad():
            yield


def reported_strides() -> contextlib.AbstractContextManager[list[Any] | None]:
    """Inside, a compiler puts the strides of its outputs into the list that is returned."""
    reported: contextlib.AbstractContextManager[list[Any] | None] = TracingContext.report_output_strides()
    return reported


def outside_of_tracing() -> contextlib.AbstractContextManager[object]:
    """Inside, no mode is active: tensors are real although a graph is being traced or a fake mode is on."""
    return _disable_current_modes()


def has_symbolic_inputs(gm: fx.GraphModule) -> bool:
    """Whether a graph of AOTAutograd takes sizes as inputs."""
    return any(isinstance(node.meta.get("val"), torch.SymInt) for node in gm.graph.find_nodes(op="placeholder"))


@contextlib.contextmanager
def kept_buffers(original: fx.GraphModule, finished: fx.GraphModule) -> Iterator[None]:
    """Inside, the compiler may not reuse the memory of inputs that are others than in the original graph: AOTAutograd's
    finding that nobody else holds them was about those."""
    context: Any = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    donated = getattr(metadata, "bw_donated_idxs", None)
    if not donated:
        yield
        return
    pairs = zip(original.graph.find_nodes(op="placeholder"), finished.graph.find_nodes(op="placeholder"), strict=True)
    same = [number for number, (old, new) in enumerate(pairs) if old.meta.get("val") is new.meta.get("val")]
    context.fw_metadata = copy.copy(metadata)
    context.fw_metadata.bw_donated_idxs = [number for number in donated if number in same]
    try:
        yield
    finally:
        context.fw_metadata = metadata


def built_in_background(gm: fx.GraphModule) -> contextlib.AbstractContextManager[None]:
    """`grass_compile._inductor.built_in_background`, for a graph and what is compiled along with it."""
    inputs = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    on_cpu = all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor))
    return _inductor.built_in_background() if on_cpu else contextlib.nullcontext()


class Halves(Protocol):
    """The compilers of the two halves of a joint graph; see `grass_compile.backend.lazy.CompiledPair`."""

    @property
    def forward(self) -> Any: ...

    @property
    def backward(self) -> Any: ...


def compile_graph(
    captured: _dynamo.Captured,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    compiler: str,
    mode: str,
    patches: Mapping[str, Any],
    partition: Partition | None,
    key: str,
    pair: Halves | None = None,
) -> Compiled:
    """Compile a graph under the contexts that Dynamo had when it called the backend.

    Args:
        captured: where ``gm`` comes from.
        gm: the graph; the compiler takes ownership.
        inputs: example inputs, fake.
        compiler: ``inductor`` or ``aot_eager``.
        mode: as ``torch.compile(mode=...)``.
        patches: Inductor config values.
        partition: splits the joint graph into forward and backward; None for torch's own.
        key: stands for ``partition`` in cache keys.
        pair: what finishes and compiles both halves; None for halves that are what they are.
    """
    # AOTAutograd's own cache would skip the partitioner, and with it our passes; Inductor's cache, keyed by the
    # rewritten graphs, still serves a second start.
    with captured.contexts(), functorch_config.patch(enable_autograd_cache=False):
        if compiler == "aot_eager":
            return _compile_eager(gm, inputs, partition, pair)
        config = {**_mode_options(mode), **patches}
        if partition is not None:
            config["custom_partitioner_fn"] = Partitioner(partition, key)

        def inner_compile(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
            if pair is None:
                return compile_fx_inner(gm, example_inputs, **kwargs)
            compile = inductor_config.patch(config)(functools.partial(_inner, **kwargs))
            return (pair.backward if kwargs.get("is_backward") else pair.forward).accept(gm, compile)

        compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner_compile, config_patches=config)
        return cast(Compiled, compiled)


def _inner(gm: fx.GraphModule, **kwargs: Any) -> Compiled:
    """Compile one finished graph."""
    output = next(iter(gm.graph.find_nodes(op="output")))
    visible = output.meta.get("user_visible_output_idxs", ())
    output.meta["user_visible_output_idxs"] = [i for i in visible if isinstance(output.args[0][i], fx.Node)]
    for node in gm.graph.nodes:  # found when nothing in the graph wrote; stale, they let patterns move reads behind our writes
        node.meta.pop("mutation_region_id", None)
    example_inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with _use_lazy_graph_module(True):
        compiled: Any = compile_fx_inner(gm, example_inputs, **kwargs)
    return cast(Compiled, compiled)


def _compile_eager(gm: fx.GraphModule, inputs: Sequence[Any], partition: Partition | None, pair: Halves | None) -> Compiled:
    def run(gm: fx.GraphModule) -> Compiled:
        return boxed_nop(gm, [])

    compiled: Compiled = aot_autograd(
        fw_compiler=boxed_nop if pair is None else lambda gm, _: pair.forward.accept(gm, run),
        bw_compiler=boxed_nop if pair is None else lambda gm, _: pair.backward.accept(gm, _unversioned),
        partition_fn=functools.partial(partition or min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table,
        keep_inference_input_mutations=True,
    )(gm, list(inputs))
    return compiled


def _unversioned(gm: fx.GraphModule) -> Compiled:
    """Run a graph op by op, `unversioned`."""
    run = boxed_nop(gm, [])

    def call(args: list[Any]) -> Any:
        with _autograd.unversioned([value for value in args if isinstance(value, Tensor)]):
            return run(args)

    return call


KERNEL = {"size_asserts": False}
"""Inductor config values for a kernel, which is called with what it was compiled for and with nothing else."""


def compile_kernel(gm: fx.GraphModule, *, compiler: str, mode: str, patches: Mapping[str, Any], key: str) -> Compiled:
    """Compile a flat graph of fake-valued nodes that needs no autograd.

    Args:
        gm: the graph; whoever calls the result sees to it that shapes, strides, dtypes and devices are those of its inputs.
        compiler: ``inductor`` or ``aot_eager``.
        mode: as ``torch.compile(mode=...)``; there are no CUDA graphs of its own.
        patches: Inductor config values.
        key: stands for how our operators are lowered, in cache keys.

    Returns:
        A function of the graph's inputs. The fake values of what the graph returns have the strides that the compiler chose.
    """
    nodes = list(gm.graph.find_nodes(op="placeholder"))
    inputs = [node.meta["val"] for node in nodes]
    if compiler == "aot_eager":
        boxed = boxed_nop(gm, inputs)
    else:
        unused = Partitioner(min_cut_rematerialization_partition, key)
        config = {**KERNEL, **_mode_options(mode), **patches, "triton.cudagraphs": False, "custom_partitioner_fn": unused}
        results = next(iter(gm.graph.find_nodes(op="output"))).args[0]
        with (
            tracing(TracingContext(inputs[0].fake_mode)), inductor_config.patch(config), torch.no_grad(),
            reported_strides() as strides,
        ):  # fmt: skip
            boxed = compile_fx_inner(gm, inputs, static_input_idxs=range(len(inputs)))
        for node, stride in zip(results, strides or [], strict=False):
            node.meta["val"] = node.meta["val"].as_strided(node.meta["val"].shape, stride)
    return lambda *args: boxed(list(args))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware, or with instructions wide enough to do well without."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def fresh_fake_mode() -> FakeTensorMode:
    """A fake tensor mode of its own; Inductor's cache wants it to know symbolic shapes, be there any or not."""
    return FakeTensorMode(shape_env=ShapeEnv())


def _mode_options(mode: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    return {} if mode == "default" else dict(list_mode_options(mode))


def decompositions() -> dict[Any, Any]:
    """Inductor's decomposition table."""
    return dict(select_decomp_table())


def common_subexpressions(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` in which equal expressions are computed once, as the partitioner makes it."""
    simplified: fx.Graph = fx_graph_cse(graph)
    return simplified


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that writes its Python code when somebody runs or reads it, and not each time a pass is done with it."""
    return _LazyGraphModule(root, graph)


_seen_by: contextvars.ContextVar[Callable[[str, fx.GraphModule], None] | None] = contextvars.ContextVar("seen_by", default=None)


@contextlib.contextmanager
def graphs_seen_by(see: Callable[[str, fx.GraphModule], None]) -> Iterator[None]:
    """Inside, in this thread, ``see`` is shown every graph that goes into the structured trace."""
    token = _seen_by.set(see)
    try:
        yield
    finally:
        _seen_by.reset(token)


def trace_graph(name: str, gm: fx.GraphModule) -> None:
    """Put a readable graph into the structured trace (``TORCH_TRACE``)."""
    if (see := _seen_by.get()) is not None:
        see(name, gm)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
    )

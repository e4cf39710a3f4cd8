"""The importer of private torch names, beside `grass_compile._inductor`. Differences between torch versions are settled here.

Nothing of ours is imported, so that any module may use this one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config
from torch._dynamo import disable as dynamo_disable
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
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

Compiled = Callable[..., Any]
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]

__all__ = ["min_cut_rematerialization_partition", "tree_map_only"]


# ----------------------------------------------------------------------------------------------- graphs from Dynamo


@dataclasses.dataclass(frozen=True)
class Captured:
    """A Dynamo graph with what is needed to compile it later, any number of times, with further inputs.

    Attributes:
        graph: our own copy; no compiler has touched it.
        example_inputs: fake tensors of Dynamo's mode (real ones would keep activations alive), and plain numbers.
        tracing: Dynamo's tracing context at the time the backend was called.
        compile: its compile context.
        parameters: ``(position, name)`` of each input that is a parameter, or another leaf tensor that requires a gradient.
    """

    graph: fx.GraphModule
    example_inputs: tuple[Any, ...]
    tracing: Any
    compile: Any
    parameters: tuple[tuple[int, str], ...]

    @contextlib.contextmanager
    def contexts(self) -> Iterator[None]:
        """Dynamo's contexts as they were when it called the backend."""
        with contextlib.ExitStack() as stack:
            if self.tracing is not None and TracingContext.try_get() is not self.tracing:
                stack.enter_context(tracing(copy.copy(self.tracing)))
                stack.enter_context(compile_context(self.compile))
            yield


def guard_requires_grad() -> None:
    """Have Dynamo notice parameters that are frozen or thawed after it compiled what uses them.

    torch 2.11 leaves out the guards of a module's parameters while their dictionary is the same one, and then trains what is
    frozen no more and what was thawed never, under any backend. Dynamo builds the guards of a graph after its backend has run.
    """
    if torch.__version__ < "2.13":
        dynamo_config.skip_tensor_guards_with_matching_dict_tags = False


CPP_LOOPS_ARE_SAFE = torch.__version__ >= "2.13"
"""Whether Inductor's C++ may lay loops out anew: in 2.11 a node to which that happens forgets which writes have to come after it
(``SchedulerNode.recompute_size_and_body``), and where an index divides the variable of a loop the code may not compile."""


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[Captured, tuple[Any, ...]]:
    """Copy a Dynamo graph; Dynamo reads the original again after the backend returns.

    Returns:
        The captured graph, and the real parameters that it was traced with (not kept).
    """
    nodes = list(gm.graph.find_nodes(op="placeholder"))
    parameters, real, fakes = [], [], []
    names = gm.meta.get("dynamo_flat_name_to_original_fqn") or {}
    for position, (node, example) in enumerate(zip(nodes, example_inputs, strict=True)):
        fakes.append(node.meta.get("example_value", example) if isinstance(example, Tensor) else example)
        if isinstance(example, torch.nn.Parameter) or _is_leaf(example):
            parameters.append((position, _qualified_name(node, names)))
            real.append(example)
    captured = Captured(_copy(gm), tuple(fakes), TracingContext.try_get(), CompileContext.try_get(), tuple(parameters))
    return captured, tuple(real)


def _is_leaf(example: Any) -> bool:
    """Whether an input is a tensor that an optimizer may hold, though it is no ``nn.Parameter``."""
    return isinstance(example, Tensor) and example.is_leaf and example.requires_grad


def _qualified_name(node: fx.Node, names: Mapping[str, str]) -> str:
    """``layers.0.weight`` from what Dynamo knows of a placeholder."""
    if found := names.get(node.name) or names.get(str(node.target)):
        return found
    grapharg = node.meta.get("grapharg")
    source = str(getattr(getattr(grapharg, "source", None), "name", node.name))
    source = re.sub(r"^[LG]\['[^']*'\]", "", source)
    for noise in ("_modules['", "_parameters['", "']", "_orig_mod."):
        source = source.replace(noise, "")
    return source.replace("['", ".").removeprefix(".")


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that a compiler may own: new nodes, the same submodules and constants."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        new.meta.pop("grapharg", None)  # it holds a weak reference to the real tensor, which `swap_tensors` does not bear
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    for attribute in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, attribute):
            setattr(copied, attribute, getattr(gm, attribute))
    return copied


def with_inputs(captured: Captured, names: Sequence[str], static: Sequence[bool]) -> fx.GraphModule:
    """A copy of a captured graph with further placeholders at the end.

    Args:
        captured: the graph.
        names: the placeholders' names.
        static: which of them keep their address from call to call (state does, hyper-parameters do not).
    """
    gm = _copy(captured.graph)
    if not names:
        return gm
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    for name, is_static in zip(names, static, strict=True):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        last._dynamo_source = None
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if is_static else {}
        last.meta["example_value"] = None
    gm.recompile()
    return gm


def fake_mode(captured: Captured) -> Any:
    """The fake tensor mode in which a graph was traced."""
    return captured.tracing.fake_mode


# ------------------------------------------------------------------------------------------------------ compilation


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


class Halves(Protocol):
    """The compilers of the two halves of a joint graph; see `grass_compile.backend.lazy.CompiledPair`."""

    @property
    def forward(self) -> Any: ...

    @property
    def backward(self) -> Any: ...


def compile_graph(
    captured: Captured,
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


def _unversioned(gm: fx.GraphModule) -> Compiled:
    """Run a graph op by op, `unversioned`."""
    run = boxed_nop(gm, [])

    def call(args: list[Any]) -> Any:
        with unversioned([value for value in args if isinstance(value, Tensor)]):
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


def stacklevel_of_caller() -> int:
    """The ``stacklevel`` for a warning that is to point at the first caller outside of torch and of this package."""
    inside = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def outside_dynamo(function: Compiled) -> Compiled:
    """Keep Dynamo from tracing ``function``."""
    disabled: Compiled = dynamo_disable(function)
    return disabled


def strip_dynamo_prefix(name: str) -> str:
    """``_orig_mod.layers.0.weight`` is ``layers.0.weight`` to the user."""
    return name.replace("_orig_mod.", "")


def run_as_is(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """The default of a ``__torch_function__`` that has no answer of its own: results keep their own class."""
    return torch._C._disabled_torch_function_impl(func, types, args, kwargs)


# ---------------------------------------------------------------------------------------------------------- autograd


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


# ------------------------------------------------------------------------------------------------------- distributed


def sharded_by(parameter: Tensor) -> str | None:
    """The name of the wrapper that shards a parameter, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return "fully_shard (FSDP2) or another DTensor wrapper"
    if hasattr(parameter, "_fsdp_flattened") or type(parameter).__name__ == "FlatParameter":
        return "FullyShardedDataParallel (FSDP1)"
    return None


# ----------------------------------------------------------------------------------------------- logging and tracing


def trace_graph(name: str, gm: fx.GraphModule) -> None:
    """Put a readable graph into the structured trace (``TORCH_TRACE``)."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
    )

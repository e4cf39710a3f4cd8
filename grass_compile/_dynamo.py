"""What this package needs of Dynamo beyond its public names: graphs as it captures them, and what it must not trace.

Nothing of ours is imported, so that any module may use this one. Differences between torch versions are settled here, and in
`_autograd`, `_aot` and `_inductor`, which alone import private names of torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config
from torch._dynamo import disable as dynamo_disable
from torch._dynamo.convert_frame import compile_lock
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch._subclasses.fake_tensor import FakeTensor

Compiled = Callable[..., Any]


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


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, this thread compiles, and no other does, neither with Dynamo nor here.

    That there is a trace is known to torch by a global, which two threads at once leave wrong for good. It is told, too, that
    this is not a script's own trace, or it would refuse to run what other threads have compiled.
    """
    session = getattr(torch.compiler, "_compile_session_context", contextlib.nullcontext)  # not in torch 2.11
    with compile_lock, session():
        yield


def guard_requires_grad() -> None:
    """Have Dynamo notice parameters that are frozen or thawed after it compiled what uses them.

    torch 2.11 leaves out the guards of a module's parameters while their dictionary is the same one, and then trains what is
    frozen no more and what was thawed never, under any backend. Dynamo builds the guards of a graph after its backend has run.
    """
    if torch.__version__ < "2.13":
        dynamo_config.skip_tensor_guards_with_matching_dict_tags = False


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
    captured = Captured(_copy(gm), tuple(fakes), _tracing_context(), CompileContext.try_get(), tuple(parameters))
    return captured, tuple(real)


def are_known(parameters: Sequence[Tensor]) -> bool:
    """Whether these are the real ones. Where ``DDPOptimizer`` splits a graph, backends are given fake ones."""
    return not any(isinstance(parameter, FakeTensor) for parameter in parameters)


def _tracing_context() -> TracingContext | None:
    """Dynamo's, for one graph. The parts of a graph that ``DDPOptimizer`` splits have one in common, and torch counts how many
    backwards it compiles for them, and runs what a backend returns with fake tensors first. Here each part is compiled when it is
    called, as often as it takes."""
    context: Any = TracingContext.try_get()
    if getattr(context, "ddp_optimizer_ctx", None) is not None:
        context = copy.copy(context)
        context.ddp_optimizer_ctx, context.fakify_first_call = None, False
    return context  # type: ignore[no-any-return]


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


def replace_inputs(gm: fx.GraphModule, made_of: Mapping[int, tuple[Callable[..., Any], int]]) -> None:
    """Let a graph compute what was some of its inputs.

    Args:
        gm: changed in place.
        made_of: for each of these, by position, a function and the position of another input: of these two inputs it makes what
            was the first.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    for position, (function, other) in made_of.items():
        given = inputs[position]
        with gm.graph.inserting_after(inputs[-1]):
            made = gm.graph.call_function(function, (given, inputs[other]))
        given.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        given.meta["example_value"] = None
    gm.recompile()


def fake_mode(captured: Captured) -> Any:
    """The fake tensor mode in which a graph was traced."""
    return captured.tracing.fake_mode


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

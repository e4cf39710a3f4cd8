"""Generate code for a GPU that is not there: Inductor's Triton for a *described* sm_90 device, compiled and assembled.

A model trains on the CPU through ``torch.compile(backend="grass")``: Dynamo, AOTAutograd, our passes and the
partitioner see what they always see. Only the last stage differs. Each forward and backward graph that reaches
Inductor's ``compile_fx_inner`` has its fake values moved to ``cuda:0`` (`retarget`); Inductor generates code for the
device that `described_device` makes up, and Triton compiles the kernels to PTX and assembles them. When the graph is
called, it returns zeros. (The graphs cannot be traced on CUDA tensors: a CPU build of torch has no autograd for them,
not even for fake ones. So what Inductor does to a *joint* graph only for a GPU, padding of products for example, is not
seen here.)

All of this patches ``torch.cuda``, Triton's driver and Inductor, and fills caches that outlive the patches. So it is
used through `generate` alone, which does it in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx

from grass_compile._described import compile_for_described_device

ROOT = pathlib.Path(__file__).parents[2]

TIMEOUT = 300
"""Seconds after which a child process is given up. A graph takes it about two seconds on one core of a Xeon."""


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of a generated module; ``dtype`` as ``torch.bfloat16``."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.shape, self.stride


@dataclasses.dataclass(frozen=True)
class Generated:
    """What Inductor made of one graph.

    Attributes:
        is_backward: whether it is a backward graph.
        code: the generated module: Triton kernels as source, and ``call``, which allocates buffers and launches them.
        ptx: the PTX of every kernel by name. It was assembled too: a kernel that is not valid for the device raises.
        inputs: what ``call`` takes, by name and in order; all are tensors.
    """

    is_backward: bool
    code: str
    ptx: dict[str, str]
    inputs: dict[str, Input]


# ------------------------------------------------------------------------------------------ in the test's process


def generate(train: Callable[..., None], *args: str) -> list[Generated]:
    """Run ``train`` for the described device, in a new process.

    Args:
        train: a function at the top level of a module; trains a model compiled with ``backend="grass"`` on the CPU.
        *args: its arguments.

    Returns:
        What was generated, in the order of compilation.

    Raises:
        RuntimeError: the child failed; the message ends with what it wrote to stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = pathlib.Path(folder) / "generated.json"
        command = [sys.executable, "-m", __name__, str(found), train.__module__, train.__qualname__, *args]
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        # With one thread Inductor compiles kernels in its own process, where the patches are.
        environment = {**os.environ, **caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if child.returncode:
            raise RuntimeError(f"{train.__qualname__}{args} failed in the child process:\n{child.stderr[-4000:]}")
        return [_from_json(graph) for graph in json.loads(found.read_text())]


def _from_json(graph: dict[str, Any]) -> Generated:
    inputs = {
        name: Input(found["dtype"], tuple(found["shape"]), tuple(found["stride"])) for name, found in graph.pop("inputs").items()
    }
    return Generated(**graph, inputs=inputs)


# ------------------------------------------------------------------------------------------ in the child process


def main(found: str, module: str, function: str, *args: str) -> None:
    """Run a function for the described device and write what was generated as JSON.

    Args:
        found: the file to write.
        module: where the function lives.
        function: its name.
        *args: its arguments.
    """
    train = getattr(importlib.import_module(module), function)
    with recorded() as graphs:
        train(*args)
    pathlib.Path(found).write_text(json.dumps([dataclasses.asdict(graph) for graph in graphs]))


@contextlib.contextmanager
def recorded() -> Iterator[list[Generated]]:
    """Compile every graph of the grass backend for the described device, keep what was generated, and run none."""
    from grass_compile import _aot, ops

    graphs: list[Generated] = []
    inner: Any = functools.partial(_compile_inner, graphs=graphs)
    with (
        mock.patch.object(_aot, "compile_fx_inner", inner),
        ops.laid_out_for("cuda"),
    ):
        yield graphs


def _compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, graphs: list[Generated], **keywords: Any
) -> Callable[..., Any]:
    """Take the place of Inductor's ``compile_fx_inner``."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    results = [node.meta["val"] if isinstance(node, fx.Node) else node for node in _returned(gm)]
    code: list[str] = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", code.append),
        config.patch(force_disable_caches=True),
        _recorded_ptx() as ptx,
    ):
        compile_for_described_device(gm, example_inputs, **keywords)
    values = {node.name: node.meta["val"] for node in _placeholders(gm)}
    inputs = {name: Input(str(value.dtype), tuple(value.shape), value.stride()) for name, value in values.items()}
    graphs.append(Generated(keywords.get("is_backward", False), code[0], ptx, inputs))
    return _zeros(results)


@contextlib.contextmanager
def _recorded_ptx() -> Iterator[dict[str, str]]:
    """Keep the PTX of every kernel that Triton compiles."""
    import triton
    from triton.compiler import compile as compile_kernel

    ptx: dict[str, str] = {}

    def compile_and_keep(source: Any, *args: Any, **keywords: Any) -> Any:
        kernel = compile_kernel(source, *args, **keywords)
        assert kernel.asm["cubin"], f"{source.name} was not assembled"
        ptx[source.name] = kernel.asm["ptx"]
        return kernel

    with mock.patch.object(triton, "compile", compile_and_keep):
        yield ptx


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _returned(gm: fx.GraphModule) -> list[Any]:
    (results,) = next(iter(gm.graph.find_nodes(op="output"))).args
    return list(results)


def _zeros(results: Sequence[Any]) -> Callable[..., Any]:
    """A compiled graph in the boxed convention that returns zeros of the right shape on the CPU."""

    def run(args: list[Any]) -> list[Any]:
        args.clear()
        return [torch.zeros(r.shape, dtype=r.dtype) if isinstance(r, torch.Tensor) else r for r in results]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train on a CPU by the very kernels that Inductor generates for a described GPU, run number by number in Triton's interpreter.

Every forward and backward graph that reaches Inductor, and every compact step, is compiled for the device that
`grass_compile._described` makes up. Its generated ``call`` then runs on CPU tensors: buffers are a CPU's, products are ATen's,
and each Triton kernel is interpreted: the interpreter runs what the compiler would compile, one program of the grid after
another.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, so this happens in a process of its own: ``train_by``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
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

from grass_compile._described import compile_for_described_device, described_device

ROOT = pathlib.Path(__file__).parents[2]

TIMEOUT = 300
"""Seconds after which a child process is given up."""

BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "ZBLOCK": 4, "R0_BLOCK": 32}
"""Sizes of a program's block. Small ones, that do not divide what is computed, so that masks have something to do."""

HEURISTICS = ("pointwise", "reduction", "persistent_reduction")


def train_by(train: Callable[..., Any], *args: str) -> Any:
    """Run ``train`` in a new process, in which every graph is compiled for the described device and interpreted.

    Args:
        train: a function at the top level of a module; trains on the CPU by ``backend="grass"`` and returns tensors.
        *args: its arguments.

    Returns:
        What it returned, and the names of the kernels that ran.

    Raises:
        RuntimeError: the child failed; the message ends with what it wrote to stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, train.__module__, train.__qualname__, *args]
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT, check=False)
        if child.returncode:
            raise RuntimeError(f"{train.__qualname__}{args} failed in the child process:\n{child.stderr.decode()[-4000:]}")
        return torch.load(io.BytesIO(child.stdout), weights_only=False)


def main(module: str, function: str, *args: str) -> None:
    """Run a function in the interpreter, and write what it returns to stdout."""
    train = getattr(importlib.import_module(module), function)
    with interpreted() as ran:
        result = train(*args)
    torch.save((result, sorted(ran)), sys.stdout.buffer)


@contextlib.contextmanager
def interpreted() -> Iterator[set[str]]:
    """Inside, graphs are compiled for the described device, and run here; collects the names of the kernels that ran."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    from grass_compile import _aot, ops

    ran: set[str] = set()
    guards = torch._C._dynamo.guards
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value, create=True))  # noqa: E731
        patch(_aot, "compile_fx_inner", _compile_inner)
        stack.enter_context(ops.laid_out_for("cuda"))
        patch(guards, "_empty_strided_cuda", guards._empty_strided_cpu)
        patch(AsyncCompile, "triton", lambda self, name, source, **_: _load(name, source))
        patch(triton_helpers, "libdevice", Libdevice())
        for name in HEURISTICS:
            patch(triton_heuristics, name, lambda ran=ran, **keywords: lambda function: Kernel(function, keywords, ran))
        yield ran


def _compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
    """Take the place of Inductor's ``compile_fx_inner``."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True, size_asserts=False, alignment_asserts=False):
        compiled = compile_for_described_device(gm, example_inputs, **keywords)

    def run(args: list[Any]) -> Any:
        with described_device():
            return compiled(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _load(name: str, source: str) -> Any:
    """A kernel by its source, which Triton wants to read from a file."""
    path = pathlib.Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


class Kernel:
    """A generated kernel; `run` is what the generated code calls."""

    def __init__(self, function: Any, keywords: dict[str, Any], ran: set[str]) -> None:
        self.function, self.ran = function, ran
        self.kind: str = keywords["inductor_meta"]["grid_type"]
        self.names = list(keywords["triton_meta"]["signature"])

    def run(self, *args: Any, stream: Any = None, **keywords: Any) -> None:
        """Interpret the kernel for each program of its grid."""
        self.ran.add(self.function.fn.__name__)
        given = dict(zip(self.names, args, strict=False))
        blocks = {name: size for name, size in BLOCKS.items() if name in self.names}
        if self.kind not in ("Grid1D", "Grid2D", "Grid3D"):
            raise NotImplementedError(f"a grid of kind {self.kind}")
        grid = tuple(
            -(-int(given[f"{axis}numel"]) // blocks.get(f"{axis.upper()}BLOCK", 1)) if f"{axis}numel" in given else 1
            for axis in "xyz"
        )
        self.function[grid](**given, **blocks)


class Libdevice:
    """NVIDIA's library, which the interpreter cannot call, by the operations of the language. They are looked up when they are
    called, since the interpreter puts its own in their places."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import triton.language as tl

        def expm1(x: Any) -> Any:  # after Kahan: what rounding does to exp(x), it does to its logarithm too
            u = tl.exp(x)
            return tl.where(u == 1, x, (u - 1) * x / tl.log(u))

        def log1p(x: Any) -> Any:
            u = 1 + x
            return tl.where(u == 1, x, tl.log(u) * x / (u - 1))

        def nearest(x: Any) -> Any:  # a half goes to the even neighbour
            up = tl.floor(x + 0.5)
            return tl.where((up - x == 0.5) & (tl.floor(up / 2) * 2 != up), up - 1, up)

        others = {
            "expm1": expm1,
            "log1p": log1p,
            "tanh": lambda x: 1 - 2 / (tl.exp(2 * x) + 1),
            "pow": lambda x, y: tl.exp(y * tl.log(x)),
            "copysign": lambda x, y: tl.where(y < 0, -tl.abs(x), tl.abs(x)),
            "nearbyint": nearest,
            "rint": nearest,
            "isnan": lambda x: x != x,
            "isinf": lambda x: tl.abs(x) == float("inf"),
        }
        return others.get(name) or getattr(tl, name)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Read a module that Inductor generated: its kernels, and which buffers its wrapper allocates, reads and writes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from collections.abc import Iterator

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Triton kernel.

    Attributes:
        parameters: names of its parameters.
        stored: those that it stores to.
        atomic: whether it uses an atomic operation.
    """

    parameters: tuple[str, ...]
    stored: frozenset[str]
    atomic: bool


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call in the wrapper that computes: of a Triton kernel, or of a library function (``extern_kernels.mm``).

    Attributes:
        function: the name of the kernel or function.
        arguments: its positional arguments as source text.
        names: every buffer and input that the call mentions.
        written: those that it writes into.
    """

    function: str
    arguments: tuple[str, ...]
    names: frozenset[str]
    written: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Module:
    """A generated module.

    Attributes:
        kernels: its Triton kernels by name.
        launches: the calls of its wrapper, in order.
        layouts: shape and stride of every buffer that the wrapper allocates or makes from one that is no longer used.
    """

    kernels: dict[str, Kernel]
    launches: tuple[Launch, ...]
    layouts: dict[str, tuple[Shape, Shape]]

    def writers(self, name: str) -> list[Launch]:
        """The launches that write a buffer or input."""
        return [launch for launch in self.launches if name in launch.written]

    def products(self, numel: int) -> list[Launch]:
        """The matrix products whose result has ``numel`` elements."""
        found = [launch for launch in self.launches if launch.function == "extern_kernels.mm"]
        return [launch for launch in found if any(self.numel(name) == numel for name in launch.written)]

    def numel(self, name: str) -> int | None:
        """The number of elements of a buffer, None for anything else."""
        return math.prod(self.layouts[name][0]) if name in self.layouts else None

    def needed(self, name: str) -> range:
        """The positions of the launches between the first and the last that mention a buffer."""
        places = [place for place, launch in enumerate(self.launches) if name in launch.names]
        return range(places[0], places[-1] + 1)


@functools.cache
def parse(code: str) -> Module:
    """Read a generated module."""
    tree = ast.parse(code)
    kernels = dict(_kernels(tree))
    launches: list[Launch] = []
    layouts: dict[str, tuple[Shape, Shape]] = {}
    wrapper = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call")
    for statement in _flat(wrapper.body):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            layout = _layout(statement.value, layouts)
            if layout is not None:
                layouts[statement.targets[0].id] = layout
                continue
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Call) and _computes(value):
            launches.append(_launch(value, kernels))
    return Module(kernels, tuple(launches), layouts)


def _kernels(tree: ast.Module) -> Iterator[tuple[str, Kernel]]:
    """Every ``name = async_compile.triton('name', '''source''')``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("async_compile.triton("):
            assert isinstance(node.value, ast.Call)
            name, source = (ast.literal_eval(argument) for argument in node.value.args[:2])
            function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
            calls = [(ast.unparse(n.func), n.args) for n in ast.walk(function) if isinstance(n, ast.Call)]
            atomic = [arguments for called, arguments in calls if called.startswith("tl.atomic")]
            stored = [arguments for called, arguments in calls if called == "tl.store"] + atomic
            pointers = frozenset(ast.unparse(arguments[0]).split(" ")[0] for arguments in stored)
            yield name, Kernel(tuple(argument.arg for argument in function.args.args), pointers, bool(atomic))


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of the wrapper, without the ``with`` blocks around them."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _flat(statement.body)
        else:
            yield statement


def _layout(value: ast.expr, layouts: dict[str, tuple[Shape, Shape]]) -> tuple[Shape, Shape] | None:
    """Shape and stride of ``empty_strided_cuda(...)``, ``reinterpret_tensor(...)`` or another buffer's name."""
    if isinstance(value, ast.Name):
        return layouts.get(value.id)
    if not isinstance(value, ast.Call):
        return None
    first = {"empty_strided_cuda": 0, "reinterpret_tensor": 1}.get(ast.unparse(value.func))
    if first is None:
        return None
    shape, stride = (ast.literal_eval(argument) for argument in value.args[first : first + 2])
    return shape, stride


def _computes(call: ast.Call) -> bool:
    """Whether a call computes something, as against checks and set-up."""
    name = ast.unparse(call.func)
    return name.endswith(".run") or name.startswith(("extern_kernels.", "torch.ops."))


def _launch(call: ast.Call, kernels: dict[str, Kernel]) -> Launch:
    function = ast.unparse(call.func).removesuffix(".run")
    arguments = tuple(ast.unparse(argument) for argument in call.args)
    if function in kernels:
        kernel = kernels[function]
        written = [a for parameter, a in zip(kernel.parameters, arguments, strict=False) if parameter in kernel.stored]
    else:
        written = [name for keyword in call.keywords if keyword.arg == "out" for name in _names(keyword.value)]
    return Launch(function, arguments, frozenset(_names(call)), frozenset(written))


def _names(expression: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(expression) if isinstance(node, ast.Name)]

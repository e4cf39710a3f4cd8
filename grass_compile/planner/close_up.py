"""What becomes of one weight: its part of the graph before and after, and the code of its step."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .. import _aot, _simulate, ops
from ..errors import ConfigError
from ..passes.fx_utils import PROVENANCE, copy, outputs, placeholders, shape_of
from ..passes.joint.interface import interface
from .plan import setup_of
from .request import Request, factory, loaded
from .training import blocks_of, staged, train

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten._scaled_mm.default)


@dataclasses.dataclass(frozen=True)
class CloseUp:
    """One weight.

    Attributes:
        name: of the parameter.
        before: the nodes of the joint graph that compute its gradient, one a line: the product, and what is done with it.
        after: the nodes in their place once it is rewritten.
        step: the node of the backward that moves the weight; empty if it waits for ``opt.step()``.
        code: the kernels that Inductor makes of the step, C++ or Triton.
    """

    name: str
    before: str
    after: str
    step: str
    code: str


def close_up(request: Request, name: str) -> CloseUp:
    """Compile the block that holds a weight, for tensors without memory, and look at what becomes of it.

    Args:
        request: as for a plan; its optimizer has to be one of this package, and ``device`` says what code is generated for.
        name: of a parameter that is projected.

    Raises:
        ConfigError: no such parameter, or it stays dense.
    """
    model = loaded(request)
    if name not in dict(model.named_parameters()):
        raise ConfigError(f"{type(model).__name__} has no parameter {name!r}; without --weight, all are listed.")
    setup = dataclasses.replace(setup_of(request, model), optimizer=factory(request))
    noted = _Noted(name)
    with staged(setup.device), noted.listening():
        shadow = setup.build()
        block = next((block for block in blocks_of(shadow) if name.startswith(f"{block}.")), "")
        shadow.get_submodule(block).compile(backend="grass")
        train(shadow, setup, 4)
    if not noted.after:
        raise ConfigError(f"{name} stays dense; without --weight, the reason is said.")
    return CloseUp(name, noted.before, noted.after, noted.step, noted.code)


class _Noted:
    """What is seen of the graphs while they are compiled."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.before = self.after = self.step = self.code = ""
        self._joint: fx.GraphModule | None = None
        self._shapes: list[Any] = []
        self._is_step_of_it = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, graphs and code are noted as they are made."""
        with _aot.graphs_seen_by(self._see_graph), _simulate.code_seen_by(self._see_code):
            yield

    def _see_graph(self, name: str, gm: fx.GraphModule) -> None:
        self._is_step_of_it = name == "grass_step" and [shape_of(node) for node in placeholders(gm)[:2]] == self._shapes
        own = [node for node in gm.graph.nodes if node.meta.get(PROVENANCE, ("", ""))[1] == self.name]
        if name == "grass_joint_before":
            self._joint = copy(gm)
        elif name == "grass_joint_after" and own and self._joint is not None:
            (anchor,) = [node for node in own if node.target is ops.anchor]
            self._shapes = [shape_of(anchor), shape_of(anchor.args[1])]
            self.before, self.after = _lines(_gradient(self._joint, anchor.args[1].name)), _lines(own)
        elif name == "grass_backward" and not self.step:
            self.step = _lines([node for node in own if node.target is ops.step_])

    def _see_code(self, code: str) -> None:
        if self._is_step_of_it and not self.code:
            self.code = _kernels(code)


def _kernels(code: str) -> str:
    """Of a module that Inductor wrote, what is between its imports and its wrapper."""
    start = re.search(r"^(# .*\n)*\w+ = async_compile\.", code, re.MULTILINE)
    return code[start.start() if start is not None else 0 : code.find("async_compile.wait(")].strip()


def _gradient(gm: fx.GraphModule, weight: str) -> list[fx.Node]:
    """The nodes between the gradient of an input and the product that it is, in order."""
    known = interface(gm, len(outputs(gm)) - len(placeholders(gm)))
    slot = next(known.slots[position] for position, node in known.nodes.items() if node.name == weight)
    found, waiting = set(), [outputs(gm)[slot]]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            if node.target not in PRODUCTS:
                waiting += node.all_input_nodes
    return [node for node in gm.graph.nodes if node in found]


def _lines(nodes: list[fx.Node]) -> str:
    return "\n".join(f"{node.name}{_kind(node.meta.get('val'))} = {_called(node)}" for node in nodes)


def _called(node: fx.Node) -> str:
    arguments = [str(argument) for argument in node.args] + [f"{name}={value}" for name, value in node.kwargs.items()]
    return f"{str(node.target).removesuffix('.default')}({', '.join(arguments)})"


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f": {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"

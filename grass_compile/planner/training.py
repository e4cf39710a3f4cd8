"""A few steps of training on tensors without memory, and what lived in them."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from .. import _simulate, ops
from ..backend import kernels
from ..errors import ConfigError, GrassError
from ..runtime.compact import is_compact
from ..runtime.gradient import CompactGrad
from .ledger import Ledger, Peak
from .models import unnoticed

Compile = Literal["blocks", "whole"]

Note = Callable[[str, torch.optim.Optimizer | None], None]

STEPS = 4
"""So many are simulated: two that "auto" defers, and two that it may fuse."""

ROUNDING = {"cpu": 1, "cuda": 512}
"""Bytes to whose multiples a device's allocator rounds up."""

OUTSIDE = "outside of compiled blocks"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is simulated.

    Attributes:
        build: makes the model, of fake tensors, in training mode.
        inputs: makes the keyword arguments that the model is called with.
        loss: makes the loss of what the model returns.
        optimizer: makes the optimizer, or None: gradients stay as a backward leaves them.
        device: ``cpu`` or ``cuda``: whose allocator.
        compile: the model as a whole or by its blocks; None: not at all.
        release: drop each dense gradient as soon as it is there, as an optimizer in the backward does.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    loss: Callable[[Any], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None
    device: str = "cpu"
    compile: Compile | None = "blocks"
    release: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One simulated step.

    Attributes:
        forward: the peak while the model runs.
        backward: the peak of the backward.
        update: the peak of the optimizer's call.
        saved: bytes that autograd keeps between forward and backward.
    """

    forward: Peak
    backward: Peak
    update: Peak
    saved: int


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What came out.

    Attributes:
        steps: in order.
        parameters: how many numbers the model holds.
        dense: the matrices of blocks that a grass optimizer trains densely.
        reads: how many numbers the forward read, which were taken for zero.
        inside: bytes of the weights of each block.
        outside: bytes of all other weights.
        gradients: bytes of all dense gradients.
        compact: numbers in all compact gradients.
    """

    steps: tuple[Step, ...]
    parameters: int
    dense: tuple[str, ...]
    reads: int
    inside: Mapping[str, int]
    outside: int
    gradients: int
    compact: int


def simulate(setup: Setup, steps: int = STEPS) -> Simulated:
    """Train on tensors without memory.

    Every step is run twice: all of them once, in which everything is compiled, and again with a fresh optimizer, watched.

    Args:
        setup: what is simulated.
        steps: how many.

    Raises:
        ConfigError: the model's forward or the optimizer needs the numbers in a tensor.
    """
    ledger = Ledger(ROUNDING[torch.device(setup.device).type])
    with staged(setup.device, lambda inputs: _owned(ledger, inputs)) as mode:
        model = setup.build()
        blocks = blocks_of(model)
        _compile(model, setup, blocks)
        train(model, setup, steps)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            ledger.see(tensor, "parameters", _part(name, blocks))
        watcher = _Watcher(ledger, mode, model, blocks)
        mode.watch = ledger.see
        train(model, setup, steps, watcher.note)
        mode.watch = None
        return watcher.found(setup.release)


@contextlib.contextmanager
def staged(device: str, called: _simulate.Called = lambda _: contextlib.nullcontext()) -> Iterator[_simulate.SimulationMode]:
    """Inside, models are made of tensors without memory, and what is compiled for them, which is forgotten after, does not run.

    Args:
        device: ``cpu`` or ``cuda``: what code is generated for.
        called: see `_simulate.simulated`.
    """
    mode = _simulate.SimulationMode({ops.step_: ops.run_step, ops.refresh_: ops.run_refresh})
    with (
        kernels.apart(),
        ops.laid_out_for(device),
        unnoticed(),
        warnings.catch_warnings(),
        _simulate.simulated(mode, called, device),
    ):
        warnings.simplefilter("ignore")
        yield mode


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the blocks of a model, which are compiled one by one: the items of each ``ModuleList`` of one class that holds
    the most parameters or more than a quarter of all, and is in no other's block; none if there is no such list."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1
    ]
    chosen: list[str] = []
    for name, module in sorted(lists, key=lambda entry: -size(entry[1])):
        if not any(name.startswith(f"{block}.") for block in chosen) and (not chosen or 4 * size(module) > size(model)):
            chosen += [f"{name}.{number}" for number in range(len(module))]
    return chosen


class _Watcher:
    """Notes what each storage is, and the peaks of each step."""

    def __init__(self, ledger: Ledger, mode: _simulate.SimulationMode, model: nn.Module, blocks: Sequence[str]) -> None:
        self.ledger, self.mode, self.model, self.blocks = ledger, mode, model, blocks
        self.steps: list[Step] = []
        self.dense: list[str] = []
        self.reads = 0
        self._marks: list[int] = []
        self._saved = self._reads = self._gradients = self._compact = 0

    def note(self, phase: str, optimizer: torch.optim.Optimizer | None) -> None:
        """A phase of a step begins (``start``) or has come to its end."""
        self._marks = [*self._marks, self.ledger.now] if phase != "start" else [self.ledger.now]
        if phase == "start":
            self._reads = self.mode.reads
        elif phase == "forward":
            self.reads += self.mode.reads - self._reads
            self._saved = self.ledger.saved()
        elif phase == "backward":
            self._note_gradients()
        if optimizer is not None:
            self._note_state(optimizer)
        if phase == "update":
            spans = zip(self._marks, self._marks[1:], strict=False)
            forward, backward, update = (self.ledger.peak(start, end - 1) for start, end in spans)
            self.steps.append(Step(forward, backward, update, self._saved))

    def found(self, released: bool) -> Simulated:
        """All of it; ``released``: gradients were dropped before they could be seen, and have the sizes of their weights."""
        weights = list(self.model.named_parameters())
        inside = {block: sum(p.nbytes for name, p in weights if name.startswith(f"{block}.")) for block in self.blocks}
        trained = sum(p.nbytes for _, p in weights if p.requires_grad)
        return Simulated(
            steps=tuple(self.steps),
            parameters=sum(p.numel() for _, p in weights),
            dense=tuple(self.dense),
            reads=self.reads,
            inside=inside,
            outside=sum(p.nbytes for _, p in weights) - sum(inside.values()),
            gradients=trained if released else self._gradients,
            compact=self._compact,
        )

    def _note_gradients(self) -> None:
        first = not self.steps
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, CompactGrad):
                self.ledger.see(gradient.compact, "compact gradients", _part(name, self.blocks))
                self._compact += gradient.compact.numel() if first else 0
            elif type(gradient) is type(parameter.data):
                self.ledger.see(gradient, "dense gradients", _part(name, self.blocks))
                self._gradients += gradient.nbytes if first else 0

    def _note_state(self, optimizer: torch.optim.Optimizer) -> None:
        self.dense = []
        for name, parameter in self.model.named_parameters():
            state = optimizer.state.get(parameter, {})
            kind = "compact state" if is_compact(state) else "dense state"
            in_block = any(name.startswith(f"{block}.") for block in self.blocks)
            if kind == "dense state" and parameter.requires_grad and parameter.dim() > 1 and in_block:
                self.dense.append(name)
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    self.ledger.see(tensor, kind, _part(name, self.blocks))


def _part(name: str, blocks: Sequence[str]) -> str:
    """The block that a parameter belongs to, or the module that holds it."""
    return next((block for block in blocks if name.startswith(f"{block}.")), name.rpartition(".")[0] or name)


def _owned(ledger: Ledger, inputs: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """What a generated function makes belongs where the first weight that it reads does. (It must not be kept from releasing its
    inputs, so nothing here holds on to them.)"""
    weights = (tensor for tensor in inputs if ledger.kind_of(tensor) == "parameters")
    return ledger.owned_by(next((ledger.owner_of(weight) for weight in weights), OUTSIDE))


def _compile(model: nn.Module, setup: Setup, blocks: Sequence[str]) -> None:
    if setup.compile == "blocks" and not blocks:
        raise ConfigError(f"{type(model).__name__} has no ModuleList of equal blocks; compile it as a whole (compile='whole').")
    for name in blocks if setup.compile == "blocks" else ():
        model.get_submodule(name).compile(backend="grass")
    if setup.compile == "whole":
        model.compile(backend="grass")
    if setup.release:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def train(model: nn.Module, setup: Setup, steps: int, note: Note = lambda *_: None) -> None:
    """Take steps.

    Args:
        model: of tensors without memory, inside of `staged`.
        setup: what else there is to it.
        steps: how many.
        note: told of the beginning of each step and the end of each of its phases.

    Raises:
        ConfigError: the model or the optimizer needs the numbers in a tensor.
    """
    optimizer = setup.optimizer(model) if setup.optimizer is not None else None
    try:
        for _ in range(steps):
            inputs = setup.inputs()
            note("start", optimizer)
            loss = setup.loss(model(**inputs))
            note("forward", optimizer)
            loss.backward()
            del loss
            note("backward", optimizer)
            if optimizer is not None:
                optimizer.step()
            note("update", optimizer)
            (model if optimizer is None else optimizer).zero_grad()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be planned without data: {error.func} needs the numbers in a tensor, and a plan has "
            "none. Plan a model of the same shapes without it (a mixture of experts: the dense model of as many active weights)."
        ) from error
    except GrassError:
        raise
    except (
        Exception
    ) as error:  # the user's model, torch's tracing, Inductor: whatever it is, the model cannot be planned as it is
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on tensors without memory: {type(error).__name__}: {reason}"
        ) from error

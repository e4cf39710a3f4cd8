"""The training loop that a sequence drives: a small model, its batches, and an optimizer behind the verbs of a script."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
"""In- and out-features. 64 × 64 is the smallest matrix that 8-bit optimizers quantize (4096 elements)."""
ROWS = 16
"""Rows of a batch."""

Batch = tuple[Tensor, Tensor]
Gradients = dict[str, Tensor]
Evidence = dict[str, tuple[Tensor, Tensor]]
"""What a sequence hands to the judge: name to (what came out, what is right)."""


class NotApplicable(Exception):
    """Something makes no sense for this optimizer; holds the reason."""


class Net(nn.Module):
    """Two linear layers with a LayerNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result are ``[rows, WIDTH]``."""
        out: Tensor = self.head(F.gelu(self.norm(self.body(x))))
        return out


def make_net(dtype: torch.dtype, seed: int) -> Net:
    """The same weights for the same seed, in any dtype."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Net().to(dtype)


class Loop:
    """A model and its optimizer, with the verbs of a training script.

    Optimizers that step in another place than ``optimizer.step()`` have a subclass, which says how a script of theirs reads.

    Args:
        subject: which optimizer.
        net: the model, whose trainable parameters the optimizer gets.
        optimizer: an optimizer that holds them already; ``None`` makes one.
        seed: of the batches.
    """

    def __init__(self, subject: Subject, net: nn.Module, optimizer: Any = None, seed: int = 0) -> None:
        self.subject, self.net, self.seed = subject, net, seed
        self.optimizer: Any = subject.build(net) if optimizer is None else optimizer
        self.model: Callable[[Tensor], Tensor] = subject.compile(net)
        self.drawn = 0
        self.completed()

    def another(self, seed: int | None = None, frozen: str | None = None) -> Loop:
        """A loop of the same kind from the start, perhaps with the parameters of the prefix ``frozen`` not trained."""
        seed = self.seed if seed is None else seed
        net = make_net(self.subject.dtype, seed)
        for name, p in net.named_parameters():
            p.requires_grad_(frozen is None or not name.startswith(frozen))
        return type(self)(self.subject, net, seed=seed)

    def over(self, net: nn.Module, optimizer: Any) -> Loop:
        """A loop that goes on with a copy of this one's model and optimizer."""
        return type(self)(self.subject, net, optimizer, self.seed)

    # ------------------------------------------------------------------------------------------- a script's verbs

    def loss(self, batch: Batch) -> Tensor:
        """The mean squared error of the batch."""
        x, y = batch
        return F.mse_loss(self.model(x), y)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """``loss.backward()``."""
        loss.backward(retain_graph=retain_graph)

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """``optimizer.step()``."""
        if closure is None:
            self.optimizer.step()
        else:
            self.optimizer.step(closure)
        self.completed()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """``optimizer.zero_grad()``."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def set_rate(self, factor: float) -> None:
        """Multiply every learning rate by ``factor``."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor

    def add_group(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """``optimizer.add_param_group``, with names if the other groups have them."""
        named = "param_names" in self.optimizer.param_groups[0]
        self.optimizer.add_param_group({"params": list(parameters.items() if named else parameters.values())})

    def state_dict(self) -> dict[str, Any]:
        """What a script saves: the model's weights and the optimizer's state."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of ``state_dict``."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.completed()

    def train(self, batches: Iterable[Batch]) -> None:
        """The plain loop: backward, step, zero_grad."""
        for batch in batches:
            self.backward(self.loss(batch))
            self.step()
            self.zero_grad()

    # ------------------------------------------------------------------------------------- what the judge looks at

    def batches(self, count: int, rows: int = ROWS) -> Iterator[Batch]:
        """The next ``count`` batches of the loop's seed."""
        for _ in range(count):
            generator = torch.Generator().manual_seed(1000 * self.seed + self.drawn)
            self.drawn += 1
            x, y = torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64).to(self.subject.dtype)
            yield x, y

    def gradients(self, batch: Batch) -> Gradients:
        """The gradients of the loss at the present weights, of the trainable parameters."""
        x, y = batch
        return self.gradients_of(lambda model: F.mse_loss(model(x), y))

    def gradients_of(self, loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Gradients:
        """The gradients of ``loss_of(model)``, on a copy of the weights, so that nothing that hangs on them takes notice."""
        copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in self.net.named_parameters()}
        loss = loss_of(lambda x: torch.func.functional_call(self.net, copies, (x,)))
        wanted = {name: copy for name, copy in copies.items() if copy.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    def train_on(self, gradients: Mapping[str, Tensor]) -> None:
        """One plain step on gradients that are given: those of a loss that is linear in the weights."""
        parameters = dict(self.net.named_parameters())
        loss = torch.stack([(parameters[name] * gradient).sum() for name, gradient in gradients.items()]).sum()
        self.backward(loss)
        self.step()
        self.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights."""
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def completed(self) -> None:
        """Remember the weights: a step is complete, and what changes from here on belongs to the next one."""
        self.settled = self.weights()

    def has_moved(self) -> bool:
        """Whether a weight has changed since the last complete step."""
        return any(not torch.equal(p, self.settled[name]) for name, p in self.weights().items())


def weights(loop: Loop, right: Loop, what: str = "") -> Evidence:
    """Every weight of ``loop`` beside that of ``right``, as evidence."""
    wanted = right.weights()
    return {f"{what}{name}": (p, wanted[name]) for name, p in loop.weights().items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """An optimizer under test.

    Attributes:
        name: as in the table; the family comes before the first dot.
        build: makes the optimizer for the trainable parameters of a model. It imports its package itself.
        package: what ``pip install`` calls it.
        dtype: of weights and batches: float64 where the optimizer allows it.
        loop: how its training loop reads.
        compile: makes what the script calls of the model.
        stance: of ``torch.compiler.set_stance``, under which all of it runs.
        oracle: the subject whose plain loop says what is right; ``None``: its own.
        not_applicable: name of a sequence to the reason why it makes no sense here.
    """

    name: str
    build: Callable[[nn.Module], Any]
    package: str = "torch"
    dtype: torch.dtype = torch.float64
    loop: type[Loop] = Loop
    compile: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda net: net
    stance: str = "default"
    oracle: Subject | None = None
    not_applicable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def start(self, seed: int = 0) -> Loop:
        """A loop at its first step."""
        return self.loop(self, make_net(self.dtype, seed), seed=seed)


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets."""
    return [p for p in net.parameters() if p.requires_grad]

"""A small decoder, trained by one process on the joined batch or by several on their parts of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import grass_compile

WORLD = 2
WIDTH, HIDDEN, VOCABULARY, BATCH, LENGTH, RANK, GAP = 16, 24, 32, 8, 6, 4, 3
PROJECTED = [f"layers.{number}.{name}" for number in range(2) for name in ("query", "value", "up", "down")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        x = x + self.query(hidden).sigmoid() * self.value(hidden).cumsum(1) / LENGTH
        return x + self.down(F.silu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)  # type: ignore[no-any-return]


def batches(steps: int) -> list[Tensor]:
    """The joined batches, ``int64[batch, length + 1]`` each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator) for _ in range(steps)]


def micro_batches(tokens: Tensor, number: int, distributed: bool) -> list[Tensor]:
    """This rank's part of a joined batch in ``number`` parts, or what all ranks together have in each."""
    parts = [part.chunk(number) for part in tokens.chunk(WORLD)]
    return list(parts[dist.get_rank()]) if distributed else [torch.cat(joined) for joined in zip(*parts, strict=True)]


class Sent(TorchDispatchMode):
    """Counts the numbers that each collective of compiled regions and of torch sends."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function._schema.name:
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            if tensors and type(tensors[0]) is Tensor:
                self.numbers[function.namespace] += tensors[0].numel()
        return function(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Training:
    """How the decoder is trained.

    Attributes:
        how: keywords of the optimizer.
        optimizer: its class; ``adopted`` for torch's own AdamW, which the backend's options project.
        compiler: of the backend.
        place: what is compiled: the ``model``, the DDP module ``around`` it, or each of its ``blocks``.
        micro: micro-batches a step.
        no_sync: whether all but the last of these are computed under ``no_sync()``.
        accumulate: whether under ``opt.accumulate()`` (on one process, they always are).
        clip: the norm that the loop itself clips to, or None.
        steps: how many.
        alone: a rank that in each step looks at a gradient and runs the model once more, as those that log do; or None.
        ddp: keywords of the DDP module; ``hook`` stands for a communication hook.
    """

    how: tuple[tuple[str, Any], ...] = ()
    optimizer: str = "AdamW"
    compiler: str = "aot_eager"
    place: str = "around"
    micro: int = 1
    no_sync: bool = False
    accumulate: bool = True
    clip: float | None = None
    steps: int = 7
    alone: int | None = None
    ddp: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass
class Outcome:
    """Weights by name, rows by name, and what the last regular step and the last refresh have sent."""

    weights: dict[str, Tensor]
    rows: dict[str, Tensor]
    regular: Counter[str]
    refresh: Counter[str]
    fused: bool
    saved: Any


def train(training: Training, distributed: bool = True, start: int = 0, saved: Any = None) -> Outcome:
    """Train, on every rank or on one alone; from ``start`` on with the state dicts that an earlier run ended with."""
    torch.manual_seed(0)
    model: Any = Decoder()
    options: dict[str, Any] = {"compiler": training.compiler}
    keywords: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "stagger": False, "seed": 5, **dict(training.how)}
    if training.optimizer == "adopted":
        options |= keywords
    if training.place == "blocks":
        for layer in model.layers:
            layer.compile(backend="grass", options=options)
    run = torch.compile(model, backend="grass", options=options) if training.place == "model" else model
    if distributed:
        ddp = dict(training.ddp)
        hook = ddp.pop("hook", False)
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1000 if "bucket_cap_mb" in ddp else 2**20  # DDPOptimizer asks for no smaller first one
        run = wrapped = DistributedDataParallel(run, **ddp)
        if hook:
            wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
    if training.place == "around":
        run = torch.compile(run, backend="grass", options=options)
    own: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, **({} if training.optimizer == "Muon" else {"eps": 1e-6})}
    adopted = training.optimizer == "adopted"
    optimizer: Any = (
        torch.optim.AdamW(model.parameters(), **own)
        if adopted
        else getattr(grass_compile, training.optimizer)(model.named_parameters(), **own, **keywords)
    )
    if saved is not None:
        weights_before, state_before = copy.deepcopy(saved)  # a pipe hands all processes the same memory
        model.load_state_dict(weights_before)
        optimizer.load_state_dict(state_before)
    sent = [Counter[str]() for _ in range(training.steps)]
    for step, tokens in list(enumerate(batches(training.steps)))[start:]:
        *first, last = micro_batches(tokens, training.micro, distributed)
        with Sent() as counter:
            for part in (*first, last):
                with contextlib.ExitStack() as stack:
                    if part is not last:
                        if not adopted and (training.accumulate or not distributed):
                            stack.enter_context(optimizer.accumulate())
                        if distributed and training.no_sync:
                            stack.enter_context(wrapped.no_sync())
                    logits = run(part[:, :-1])
                    loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / training.micro
                    loss.backward()
            if distributed and training.alone == dist.get_rank():
                model.layers[0].up.weight.grad.abs().max().item()
                model(last[:, :-1]).sum().item()
            if training.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            optimizer.zero_grad()
        sent[step] = counter.numbers
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    selectors = {name: {"index", "basis", "key"} & entry.keys() for name, entry in state.items()}
    rows = {name: state[name][min(keys)].clone() for name, keys in selectors.items() if keys}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if distributed and not adopted:
        optimizer.check_agreement()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return Outcome(weights, rows, sent[-2], sent[-1], not adopted and bool(optimizer.fused), saved)

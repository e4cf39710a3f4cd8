"""A small decoder, trained by one process on the joined batch or by several on their parts of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import unittest.mock
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import grass_compile
from grass_compile.ops import scores

WORLD = 2
WIDTH, HIDDEN, VOCABULARY, BATCH, LENGTH, RANK, GAP = 16, 24, 32, 8, 6, 4, 3
DEFAULTS = {"rank": RANK, "update_proj_gap": GAP, "stagger": False, "seed": 5}
PROJECTED = [f"layers.{number}.{name}" for number in range(2) for name in ("query", "value", "up", "down")]


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        x = x + self.query(hidden).sigmoid() * self.value(hidden).cumsum(1) / LENGTH
        return x + self.down(F.silu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self, hidden: int = HIDDEN, checkpoint: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(hidden), Block(hidden)])
        self.checkpoint = checkpoint
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.checkpoint else layer(x)
        return self.lm_head(x)  # type: ignore[no-any-return]


def batches(steps: int) -> list[Tensor]:
    """The joined batches, ``int64[batch, length + 1]`` each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator) for _ in range(steps)]


def micro_batches(tokens: Tensor, number: int, distributed: bool, world: int = WORLD, tensor: int = 1) -> list[Tensor]:
    """This rank's part of a joined batch in ``number`` parts, or what all ranks together have in each."""
    parts = [part.chunk(number) for part in tokens.chunk(world // tensor)]
    return list(parts[dist.get_rank() // tensor]) if distributed else [torch.cat(joined) for joined in zip(*parts, strict=True)]


class Sent(TorchDispatchMode):
    """Counts the numbers that each collective of compiled regions and of torch sends."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function._schema.name:
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            if tensors and type(tensors[0]) is Tensor:
                self.numbers[function.namespace] += tensors[0].numel()
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Sent:
        for name, groups_of in (("summed", len), ("summed_part", lambda group: 1)):  # what operators send, no mode sees
            counted = functools.partial(self._counted, getattr(scores, name), groups_of)
            self._stack.enter_context(unittest.mock.patch.object(scores, name, counted))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()
        super().__exit__(*exception)

    def _counted(self, function: Any, groups_of: Any, tensor: Tensor, groups: Any) -> Tensor:
        self.numbers["_c10d_functional"] += tensor.numel() * groups_of(groups)
        return function(tensor, groups)  # type: ignore[no-any-return]


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
        crossed: whether ``fully_shard`` shards every weight along dimension 0, as by default, under tensor parallelism too.
        mesh: the shape of the mesh for ``fully_shard``: one number, or two where parts have replicas; none for DDP.
        fsdp: keywords of ``fully_shard``; ``dim`` is the dimension to shard matrices along, ``dtype`` that in which a mixed
            precision policy computes.
        tensor: how many ranks share each batch, and the inner layers, by tensor parallelism; the last dimension of the mesh.
        world: how many ranks there are.
        hidden: the width of the decoder's inner layers.
        checkpoint: whether each block is computed again in the backward.
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
    mesh: tuple[int, ...] = ()
    fsdp: tuple[tuple[str, Any], ...] = ()
    tensor: int = 1
    crossed: bool = False
    world: int = WORLD
    hidden: int = HIDDEN
    checkpoint: bool = False


@dataclasses.dataclass
class Outcome:
    """Weights by name, rows by name, and what the last regular step and the last refresh have sent."""

    weights: dict[str, Tensor]
    rows: dict[str, Tensor]
    regular: Counter[str]
    refresh: Counter[str]
    fused: bool
    saved: Any


def parallelize(model: Any, mesh: Any) -> None:
    """Tensor parallelism of the linear layers of each block."""
    whole_output = ColwiseParallel(output_layouts=Replicate())
    plan = {"query": whole_output, "value": whole_output, "up": ColwiseParallel(), "down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def shard(model: Any, training: Training) -> None:
    """Tensor parallelism, and ``fully_shard`` of each block and then of the rest, as far as they are asked for."""
    keywords, shared = dict(training.fsdp), training.tensor > 1
    names = [name for name, used in (("replicas", len(training.mesh) > 1), ("shards", training.mesh), ("tensor", shared)) if used]
    mesh = init_device_mesh("cpu", (*training.mesh, *(training.tensor,) * shared), mesh_dim_names=tuple(names))
    if shared:
        parallelize(model, mesh["tensor"])
    if not training.mesh:
        return
    keywords["mesh"] = mesh[tuple(names[:-1])] if shared else mesh
    dim, rowwise = keywords.pop("dim", 0), set()
    if shared and not training.crossed:
        rowwise = {id(layer.down.weight) for layer in model.layers}
    if dim or rowwise:
        keywords["shard_placement_fn"] = lambda p: Shard(1 if id(p) in rowwise else dim if p.dim() == 2 else 0)
    if dtype := keywords.pop("dtype", None):
        keywords["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, **keywords)
    fully_shard(model, **keywords)


def whole(parameter: Tensor, detached: bool = True) -> Tensor:
    """A parameter as one tensor, whichever part of it this rank owns."""
    parameter = parameter.detach() if detached else parameter
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class Trained:
    """The decoder, what is called in its place, and its optimizer, as every rank or one process alone sets them up.

    Attributes:
        model: the decoder.
        run: what is called.
        ddp: the DDP module, if there is one.
        optimizer: the optimizer.
        adopted: whether it is one of torch's own.
    """

    def __init__(self, training: Training, distributed: bool = True, make_optimizer: bool = True) -> None:
        torch.manual_seed(0)
        self.training, self.distributed, self.ddp = training, distributed, None
        self.adopted = training.optimizer == "adopted"
        self.model: Any = Decoder(training.hidden, training.checkpoint)
        options: dict[str, Any] = {"compiler": training.compiler}
        if self.adopted:
            options |= {**DEFAULTS, **dict(training.how)}
        if training.place == "blocks":
            for layer in self.model.layers:
                layer.compile(backend="grass", options=options)
        self.run = torch.compile(self.model, backend="grass", options=options) if training.place == "model" else self.model
        if distributed and (training.mesh or training.tensor > 1):
            shard(self.model, training)
        elif distributed:
            self._wrap()
        if training.place == "around":
            self.run = torch.compile(self.run, backend="grass", options=options)
        self.optimizer: Any = None
        if make_optimizer:
            self.make_optimizer()

    def make_optimizer(self) -> None:
        """Give the parameters as they are now to an optimizer."""
        training = self.training
        keywords: dict[str, Any] = {**DEFAULTS, **dict(training.how)}
        has_eps = self.adopted or "AdamW" in training.optimizer
        own: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, **({"eps": 1e-6} if has_eps else {})}
        self.optimizer = (
            torch.optim.AdamW(self.model.parameters(), **own)
            if self.adopted
            else getattr(grass_compile, training.optimizer)(self._groups(), **own, **keywords)
        )

    def _groups(self) -> Any:
        """The parameters by name; under tensor parallelism, with rows of what is sharded by columns."""
        named = list(self.model.named_parameters())
        if self.training.tensor == 1:
            return named
        rowwise = [pair for pair in named if pair[0].endswith("down.weight")]
        return [{"params": [pair for pair in named if pair[0] not in dict(rowwise)]}, {"params": rowwise, "axis": "rows"}]

    def _wrap(self) -> None:
        keywords = dict(self.training.ddp)
        hook = keywords.pop("hook", False)
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1000 if "bucket_cap_mb" in keywords else 2**20  # DDPOptimizer asks for no smaller one
        self.run = self.ddp = DistributedDataParallel(self.run, **keywords)
        if hook:
            self.ddp.register_comm_hook(None, default_hooks.allreduce_hook)

    def weights(self) -> dict[str, Tensor]:
        """A copy of each, as one tensor."""
        return {name: whole(parameter).clone() for name, parameter in self.model.named_parameters()}


def step_of(run: Trained, tokens: Tensor) -> None:
    """Train on one joined batch."""
    training = run.training
    *first, last = micro_batches(tokens, training.micro, run.distributed, training.world, training.tensor)
    for part in (*first, last):
        with contextlib.ExitStack() as stack:
            if part is not last:
                if not run.adopted and (training.accumulate or not run.distributed):
                    stack.enter_context(run.optimizer.accumulate())
                if run.ddp is not None and training.no_sync:
                    stack.enter_context(run.ddp.no_sync())
            logits = run.run(part[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / training.micro
            loss.backward()
    if run.distributed and training.alone == dist.get_rank():
        run.model.layers[0].up.weight.grad.abs().max().item()
        run.model(last[:, :-1]).sum().item()
    if training.clip is not None:
        nn.utils.clip_grad_norm_(run.model.parameters(), training.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()


def train(training: Training, distributed: bool = True, start: int = 0, saved: Any = None) -> Outcome:
    """Train, on every rank or on one alone; from ``start`` on with the state dicts that an earlier run ended with."""
    run = Trained(training, distributed)
    model, optimizer = run.model, run.optimizer
    if saved is not None:
        weights_before, state_before = copy.deepcopy(saved)  # a pipe hands all processes the same memory
        model.load_state_dict(weights_before)
        optimizer.load_state_dict(state_before)
    sent = [Counter[str]() for _ in range(training.steps)]
    for step, tokens in list(enumerate(batches(training.steps)))[start:]:
        with Sent() as counter:
            step_of(run, tokens)
        sent[step] = counter.numbers
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    selectors = {name: {"index", "basis", "key"} & entry.keys() for name, entry in state.items()}
    rows = {name: state[name][min(keys)].clone() for name, keys in selectors.items() if keys}
    if distributed and not run.adopted:
        optimizer.check_agreement()
    saved = None if training.mesh or training.tensor > 1 else copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return Outcome(run.weights(), rows, sent[-2], sent[-1], not run.adopted and bool(optimizer.fused), saved)


def with_a_penalty(training: Training, distributed: bool = True) -> dict[str, Tensor]:
    """Three steps to whose loss a script adds a norm of the parameters, before and after the model runs."""
    run = Trained(training, distributed)
    for step, tokens in enumerate(batches(3)):
        (part,) = micro_batches(tokens, 1, distributed, training.world, training.tensor)
        losses = [F.cross_entropy(run.run(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())]
        losses.insert(step % 2, sum(whole(p, False).square().sum() for p in run.model.layers.parameters()))
        sum(losses).backward()  # type: ignore[union-attr]
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.weights()


def partly_eager(training: Training, distributed: bool = True) -> dict[str, Tensor]:
    """Steps of which one falls out of the compiled regions; on one process it is computed in them."""
    run = Trained(training, distributed)
    for step, tokens in enumerate(batches(6)):
        with torch.compiler.set_stance("force_eager" if distributed and step == 4 else "default"):
            step_of(run, tokens)
    return run.weights()


def save_and_go_on(training: Training, folder: str, at: int) -> dict[str, Tensor]:
    """Train, save after some steps, and go on."""
    run = Trained(training)
    data = batches(training.steps)
    for tokens in data[:at]:
        step_of(run, tokens)
    weights, state = get_state_dict(run.model, run.optimizer)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)
    for tokens in data[at:]:
        step_of(run, tokens)
    return run.weights()


def load_and_go_on(training: Training, folder: str, at: int) -> dict[str, Tensor]:
    """Load into an optimizer that has taken no step, and go on; an unmodified script's is taken over in its first."""
    run = Trained(training)
    data = batches(training.steps)
    if run.adopted:
        step_of(run, data[-1])
    weights, state = get_state_dict(run.model, run.optimizer)
    dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
    set_state_dict(run.model, run.optimizer, model_state_dict=weights, optim_state_dict=state)
    for tokens in data[at:]:
        step_of(run, tokens)
    return run.weights()

"""Streaming DiLoCo: two workers against the algorithm as it is written, what moved rows alone are worth, and what is sent."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import grass_compile
from grass_compile import ConfigError, StateError
from grass_compile.distributed import DiLoCo
from grass_compile.distributed.codes import BITS, BLOCK, decode, encode
from grass_compile.distributed.exchange import Mean
from grass_compile.distributed.fragments import is_due, split

from .compare import how
from .ranks import Ranks, result_of
from .training import RANK, VOCABULARY, WIDTH, WORLD, batches

HIDDEN, LR, MOMENTUM = 20, 0.4, 0.9


class Net(nn.Module):
    """Two layers, each a matrix that is projected; embedding, norm and head stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.layers[1](self.layers[0](self.norm(x)).tanh()).cumsum(1)
        return self.lm_head(x)  # type: ignore[no-any-return]


SIZES = {name: parameter.numel() for name, parameter in Net().named_parameters()}
DENSE = sum(size for name, size in SIZES.items() if "layers" not in name)
COMPACT = RANK * (HIDDEN + WIDTH)  # of columns and of rows alike


@dataclasses.dataclass(frozen=True)
class Run:
    """How workers train.

    Attributes:
        optimizer: the inner one: a class of ours, or ``torch`` for torch's AdamW.
        inner: its keywords.
        decay: its weight decay.
        gap: steps between refreshes.
        steps: how many.
        outer: keywords of `DiLoCo`.
        bad: the step in which the second worker has a loss that is not finite, or 0.
        extra: whether the second worker takes a step more than the first, before all others.
    """

    optimizer: str = "AdamW"
    inner: tuple[tuple[str, Any], ...] = ()
    decay: float = 0.1
    gap: int = 3
    steps: int = 9
    outer: tuple[tuple[str, Any], ...] = how(every=4, fragments=2)
    bad: int = 0
    extra: bool = False

    def change(self, **keywords: Any) -> Run:
        """The same with other keywords of `DiLoCo`."""
        return dataclasses.replace(self, outer=tuple({**dict(self.outer), **keywords}.items()))


class Worker:
    """A model and its optimizer."""

    def __init__(self, run: Run, rank: int) -> None:
        torch.manual_seed(0)
        self.run, self.rank, self.steps = run, rank, 0
        self.model: Any = Net()
        own = {"lr": 1e-2, "weight_decay": run.decay, **({"eps": 1e-6} if run.optimizer in ("AdamW", "torch") else {})}
        if run.optimizer == "torch":
            self.opt: Any = torch.optim.AdamW(self.model.parameters(), **own)
            self.compiled: Any = self.model
            return
        keywords = {"rank": RANK, "update_proj_gap": run.gap, "stagger": False, "seed": 5, **dict(run.inner)}
        self.opt = getattr(grass_compile, run.optimizer)(self.model.named_parameters(), **own, **keywords)
        self.compiled = torch.compile(self.model, backend="grass", options={"compiler": "aot_eager"})

    def step(self, tokens: Tensor, world: int = WORLD) -> None:
        """Train on this worker's part of a joined batch."""
        self.steps += 1
        part = tokens.chunk(world)[self.rank]
        loss = F.cross_entropy(self.compiled(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        (loss * float("nan") if self.rank == 1 and self.steps == self.run.bad else loss).backward()
        self.opt.step()
        self.opt.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def rows(self) -> dict[str, frozenset[int]]:
        """The rows of each projected weight."""
        state = {name: self.opt.state[parameter] for name, parameter in self.model.named_parameters()}
        return {name: frozenset(entry["index"].tolist()) for name, entry in state.items() if "index" in entry}


@dataclasses.dataclass
class Trained:
    """What a worker ends with."""

    weights: dict[str, Tensor]
    outer: dict[str, Tensor]
    numbers: int
    bytes: int
    rows: list[dict[str, frozenset[int]]]
    fused: bool


def train(*runs: Run) -> list[Trained]:
    """One worker of the group, in each run; what is compiled serves all of them."""
    return [train_once(run) for run in runs]


def train_once(run: Run) -> Trained:
    """One worker of the group."""
    worker = Worker(run, dist.get_rank())
    diloco = DiLoCo(worker.model.named_parameters(), worker.opt, lr=LR, momentum=MOMENTUM, **dict(run.outer))
    if run.extra and worker.rank == 1:
        worker.step(batches(1)[0])
    rows = []
    for tokens in batches(run.steps):
        worker.step(tokens, dist.get_world_size())
        rows.append(worker.rows())
        diloco.step()
    outer, fused = copy.deepcopy(diloco.outer), bool(getattr(worker.opt, "fused", False))
    return Trained(worker.weights(), outer, diloco.numbers_sent, diloco.bytes_sent, rows, fused)


def as_written(run: Run, fragments: list[list[str]]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Algorithm 2 of the paper with whole deltas, in float64 but for the inner steps; both workers in one process. Returns the
    outer weights, and those of each worker."""
    keywords = {"overlap": 0, "alpha": 0.0, **dict(run.outer)}
    workers = [Worker(run, rank) for rank in range(WORLD)]
    parameters = [dict(worker.model.named_parameters()) for worker in workers]
    outer = {name: weight.double() for name, weight in workers[0].weights().items()}
    velocity, sent = {name: torch.zeros_like(weight) for name, weight in outer.items()}, {}
    for step, tokens in enumerate(batches(run.steps), 1):
        for worker in workers:
            worker.step(tokens)
        for number, names in enumerate(fragments):
            if (step - keywords["every"] * (number + 1) // len(fragments)) % keywords["every"] == 0:
                deltas = {name: sum(outer[name] - mine[name].detach() for mine in parameters) / WORLD for name in names}
                sent[number] = (step + keywords["overlap"], deltas)
            due, deltas = sent.get(number, (0, {}))
            for name, delta in deltas.items() if due == step else ():
                velocity[name] = MOMENTUM * velocity[name] + delta
                outer[name] = outer[name] - LR * (delta + MOMENTUM * velocity[name])
                for mine in parameters:
                    mixed = keywords["alpha"] * mine[name].detach() + (1 - keywords["alpha"]) * outer[name]
                    mine[name].detach().copy_(mixed)
    return outer, [worker.weights() for worker in workers]


def fragments_of(run: Run) -> list[list[str]]:
    return split(SIZES, dict(run.outer)["fragments"])


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, tensor in expected.items():
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[name], tensor.to(found[name].dtype), rtol=tolerance, atol=tolerance, msg=message)


def results(group: Ranks, *runs: Run) -> list[list[Trained]]:
    """What the workers end with, for each run; all have the same outer weights, bit for bit."""
    found = [list(trained) for trained in zip(*result_of(group(train, *runs)), strict=True)]
    for first, *others in found:
        for other in others:
            assert [name for name, tensor in first.outer.items() if not torch.equal(tensor, other.outer[name])] == []
    return found


# --------------------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize(
    ("optimizer", "axis", "decay", "fragments"),
    [("AdamW", "columns", 0.1, 2), ("AdamW", "rows", 0.0, 1), ("Muon", "rows", 0.1, 1), ("torch", "columns", 0.1, 2)],
)
def test_workers_go_by_the_algorithm(ranks: Ranks, optimizer: str, axis: str, decay: float, fragments: int) -> None:
    """Each window has a refresh; only rows that have moved are sent."""
    run = Run(optimizer, how(axis=axis, step_in_backward=True), decay, outer=how(every=4, fragments=fragments))
    (trained,) = results(ranks, run)
    outer, weights = as_written(run, fragments_of(run))
    check_close(trained[0].outer, outer)
    for found, expected in zip(trained, weights, strict=True):
        check_close(found.weights, expected)
        assert found.fused == (optimizer != "torch")


@pytest.mark.parametrize(("overlap", "alpha"), [(1, 0.0), (3, 0.3)])
def test_messages_travel_while_training_goes_on(ranks: Ranks, overlap: int, alpha: float) -> None:
    """They are about the weights of the step in which they were sent, and arrive ``overlap`` steps later."""
    run = Run("torch", outer=how(every=4, fragments=2, overlap=overlap, alpha=alpha))
    (trained,) = results(ranks, run)
    outer, weights = as_written(run, fragments_of(run))
    check_close(trained[0].outer, outer)
    for found, expected in zip(trained, weights, strict=True):
        check_close(found.weights, expected)


@pytest.mark.parametrize(
    ("optimizer", "axis", "decay", "overlap", "alpha", "gap"),
    [
        ("AdamW", "columns", 0.1, 0, 0.0, 3),
        ("Muon", "rows", 0.1, 2, 0.5, 2),  # refreshes come right after messages arrive
        ("SGD", "columns", 0.1, 3, 0.0, 5),
        ("AdamW", "rows", 0.0, 0, 0.5, 3),
    ],
)
def test_moved_rows_are_all_there_is_to_send(
    ranks: Ranks, optimizer: str, axis: str, decay: float, overlap: int, alpha: float, gap: int
) -> None:
    """Whole weights end with the same numbers, to the rounding of fp32."""
    run = Run(optimizer, how(axis=axis), decay, gap, 14, how(every=4, fragments=1, overlap=overlap, alpha=alpha))
    moved, whole = results(ranks, run, run.change(sparse=False))
    assert moved[0].numbers < whole[0].numbers
    for one, other in zip(moved, whole, strict=True):
        check_close(one.outer, other.outer)
        check_close(one.weights, other.weights)


@pytest.mark.parametrize(
    ("optimizer", "inner"),
    [("AdamW", how(stagger=True, share_index=True)), ("AdamW", how(projection="gaussian", on_refresh="keep")), ("Lion", ())],
)
def test_features_of_the_inner_optimizer(ranks: Ranks, optimizer: str, inner: tuple[tuple[str, Any], ...]) -> None:
    moved, whole = results(ranks, run := Run(optimizer, inner), run.change(sparse=False))
    check_close(moved[0].outer, whole[0].outer)
    assert (moved[0].numbers < whole[0].numbers) == ("gaussian" not in dict(inner).values())


def in_bf16(decay: float) -> dict[str, Tensor]:
    """The outer weights of a worker whose own are bf16."""
    worker = Worker(Run(decay=decay, inner=how(stochastic_rounding=True)), dist.get_rank())
    worker.model.to(torch.bfloat16)
    diloco = DiLoCo(worker.model.named_parameters(), worker.opt, every=4, fragments=1, overlap=1, bits=16)
    for tokens in batches(9):
        worker.step(tokens)
        diloco.step()
    return diloco.outer


def test_weights_in_bf16(ranks: Ranks) -> None:
    """Have outer weights in fp32, the same on all workers."""
    first, second = result_of(ranks(in_bf16, 0.1))
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_step_that_one_worker_skips(ranks: Ranks) -> None:
    """It does not decay there, so rows that have not moved differ; the outer weights stay the same on all."""
    run = Run(inner=how(nonfinite="skip"), bad=2, gap=100)
    moved, whole = results(ranks, run, run.change(sparse=False))
    check_close(moved[0].outer, whole[0].outer)


def start(seed: int) -> dict[str, Tensor]:
    """The weights of a worker that had others than the first."""
    torch.manual_seed(seed + dist.get_rank())
    model = Net()
    DiLoCo(model.named_parameters(), torch.optim.AdamW(model.parameters()), every=4)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_workers_begin_with_the_weights_of_the_first(ranks: Ranks) -> None:
    first, second = result_of(ranks(start, 3))
    torch.manual_seed(3)
    check_close(first, dict(Net().named_parameters()), 0.0)
    check_close(second, first, 0.0)


# ----------------------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_numbers_and_bytes(ranks: Ranks, axis: str) -> None:
    """Between refreshes ``m r`` of a projected weight, and of the others all; and 16 bytes for each that say what is sent."""
    run = Run(inner=how(axis=axis), gap=100, steps=4, outer=how(every=4, fragments=1))
    for bits, found in zip(BITS, results(ranks, *(run.change(bits=bits) for bits in BITS)), strict=True):
        assert [trained.numbers for trained in found] == [COMPACT + DENSE] * WORLD
        blocks = -(-(COMPACT + DENSE) // BLOCK)
        coded = blocks * (BLOCK * bits // 8 + (4 if bits < 16 else 0))
        assert [trained.bytes for trained in found] == [coded + 16 * len(SIZES)] * WORLD


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_a_refresh_in_the_window_sends_the_union(ranks: Ranks, axis: str) -> None:
    run = Run(inner=how(axis=axis), gap=3, steps=4, outer=how(every=4, fragments=1))
    found = results(ranks, run)[0][0]
    shapes = {name: p.shape for name, p in Net().named_parameters()}
    expected = DENSE
    for name in found.rows[0]:
        union = frozenset().union(*(rows[name] for rows in found.rows))
        assert RANK < len(union) <= 2 * RANK
        expected += len(union) * shapes[name][0 if axis == "columns" else 1]
    assert found.numbers == expected


@pytest.mark.parametrize("bits", BITS)
def test_rounding(bits: int) -> None:
    """16 and 4 bits round relatively to the number (4 bits: or to 1/24 of the largest of its block), 8 bits to the largest."""
    numbers = torch.randn(3, 4 * BLOCK, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 4 * BLOCK)
    found = decode(encode(numbers, bits), bits)
    largest = numbers.unflatten(1, (-1, BLOCK)).abs().amax(2).repeat_interleave(BLOCK, 1)
    levels = torch.maximum(numbers.abs() / 3, largest / 24)
    bound = {32: 0.0 * largest, 16: numbers.abs() / 256, 8: largest / 254, 4: levels}[bits]
    assert bool(((found - numbers).abs() <= bound * 1.0001).all())
    assert encode(numbers, bits).nbytes == 3 * 4 * (BLOCK * bits // 8 + (4 if bits < 16 else 0))
    assert torch.equal(decode(encode(found, bits), bits), found)
    assert not decode(encode(torch.zeros(1, BLOCK), bits), bits).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bits: int, bad: float) -> None:
    numbers = torch.ones(1, 2 * BLOCK)
    numbers[0, 3] = bad
    found = decode(encode(numbers, bits), bits)
    assert not bool(found[0, 3].isfinite()) and bool((found[0, BLOCK:] == 1).all())


def mean_of(bits: int) -> tuple[Tensor, Tensor]:
    """The mean of a vector that each rank has, as it is found and as it is."""
    vectors = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(dist.get_world_size())]
    codes = Mean.encoded(vectors[dist.get_rank()], bits, None)
    mean = Mean(codes, 1000, bits, None)
    found = mean.wait()
    parts = 1 if len(vectors) == 2 else len(vectors)
    assert mean.bytes_sent == (len(vectors) - 1) * codes.numel() // parts * (1 if parts == 1 else 2)
    return found, torch.stack(vectors).double().mean(0).float()


def check_means(group: Ranks) -> None:
    for bits, bound in {32: 1e-6, 16: 0.02, 8: 0.05, 4: 1.5}.items():
        found = result_of(group(mean_of, bits))
        assert all(torch.equal(other, found[0][0]) for other, _ in found)
        assert float((found[0][0] - found[0][1]).abs().max()) < bound


def test_means_are_the_same_on_two_ranks(ranks: Ranks) -> None:
    check_means(ranks)


def test_four_workers(four: Ranks) -> None:
    """Whose messages take two halves, each of which travels while training goes on."""
    check_means(four)
    run = Run("torch", steps=8, outer=how(every=4, fragments=2, overlap=3))
    exact, rough = results(four, run, run.change(bits=8))
    check_close(rough[0].outer, exact[0].outer, 0.02)
    for at in (5, 6):
        assert all(result_of(four(interrupted, run, at)))


# ------------------------------------------------------------------------------------------------------------ checkpoints


def interrupted(run: Run, at: int) -> bool:
    """Whether a run that is saved after some steps, and goes on in new objects, ends with the same bits."""
    world = dist.get_world_size()

    def begin() -> tuple[Worker, DiLoCo]:
        worker = Worker(run, dist.get_rank())
        return worker, DiLoCo(worker.model.named_parameters(), worker.opt, **dict(run.outer))

    worker, diloco = begin()
    saved = io.BytesIO()
    for number, tokens in enumerate(batches(run.steps)):
        if number == at:
            torch.save([worker.model.state_dict(), worker.opt.state_dict(), diloco.state_dict()], saved)
        worker.step(tokens, world)
        diloco.step()
    expected = {**worker.weights(), **{f"outer {name}": tensor for name, tensor in diloco.outer.items()}}
    worker, diloco = begin()
    saved.seek(0)
    for part, state in zip((worker.model, worker.opt, diloco), torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    for tokens in batches(run.steps)[at:]:
        worker.step(tokens, world)
        diloco.step()
    found = {**worker.weights(), **{f"outer {name}": tensor for name, tensor in diloco.outer.items()}}
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("at", "bits"), [(3, 32), (5, 4)])
def test_resuming_bit_for_bit(ranks: Ranks, at: int, bits: int) -> None:
    """Between two messages, and while one is on its way."""
    run = Run(inner=how(step_in_backward=True), outer=how(every=4, fragments=1, overlap=3, bits=bits))
    assert result_of(ranks(interrupted, run, at)) == [True, True]


def load(kind: str) -> None:
    run = Run("torch", outer=how(every=4, fragments=1, overlap=2))
    worker = Worker(run, dist.get_rank())
    diloco = DiLoCo(worker.model.named_parameters(), worker.opt, **dict(run.outer))
    for tokens in batches(4):
        worker.step(tokens)
        diloco.step()
    state = copy.deepcopy(diloco.state_dict())
    if kind == "workers":
        state["workers"] = 3
    elif kind == "names":
        state["weights"]["other"] = state["weights"].pop("embedding.weight")
    else:
        state["weights"]["embedding.weight"]["outer"] = torch.zeros(3)
    diloco.load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("workers", "a message was on its way when this was saved, and workers was 3; here it is 2"),
        ("names", "embedding.weight: it is in the state or here, but not in both"),
        ("shape", r"embedding.weight: its shape is \[3\] in the state, and \[32, 16\] here"),
    ],
)
def test_a_state_that_does_not_fit(ranks: Ranks, kind: str, message: str) -> None:
    for result in ranks(load, kind):
        assert isinstance(result, StateError) and re.search(message, str(result)), result


# --------------------------------------------------------------------------------------------------------------- refusals


def train_differently(inner: dict[str, Any], outer: dict[str, Any]) -> None:
    """Each of the keywords has a value for each rank."""
    mine = {name: values[dist.get_rank()] for name, values in inner.items()}
    worker = Worker(Run(inner=tuple(mine.items())), dist.get_rank())
    keywords = {"every": 4, **{name: values[dist.get_rank()] for name, values in outer.items()}}
    DiLoCo(worker.model.named_parameters(), worker.opt, **keywords)


@pytest.mark.parametrize(
    ("inner", "outer", "message"),
    [
        ({"seed": (1, 2)}, {}, "seed is 1 on rank 0 and 2 on rank 1"),
        ({"rank": (2, 3)}, {}, "embedding.weight: rank is 2 on rank 0 and 3 on rank 1"),
        ({}, {"every": (4, 5)}, "DiLoCo's every is 4 on rank 0 and 5 on rank 1"),
        ({"selection": ("top", "top")}, {}, "layers.0.weight: selection='top' chooses its rows by the gradient"),
    ],
)
def test_workers_that_differ_are_refused_on_all(ranks: Ranks, inner: dict[str, Any], outer: dict[str, Any], message: str) -> None:
    for result in ranks(train_differently, inner, outer):
        assert isinstance(result, ConfigError) and re.search(message, str(result)), result


def test_seeds_may_differ_where_whole_weights_are_sent(ranks: Ranks) -> None:
    result_of(ranks(train_differently, {"seed": (1, 2)}, {"sparse": (False, False)}))


def test_a_seed_that_is_drawn_is_that_of_the_first_worker(ranks: Ranks) -> None:
    result_of(ranks(train_differently, {"seed": (None, None)}, {}))


def test_other_rows_on_one_worker_are_found(ranks: Ranks) -> None:
    """One takes a step more, so that its next refresh comes before the message and not after it."""
    run = Run(extra=True, gap=3, steps=3, outer=how(every=3, fragments=1))
    for result in ranks(train, run):
        assert isinstance(result, StateError), result
        assert "layers.0.weight: other rows have moved on rank 1 than on rank 0" in str(result)


def refuse(kind: str, keywords: dict[str, Any]) -> None:
    model = torch.nn.Linear(4, 4)
    opt: Any = torch.optim.SGD(model.parameters())
    named: Any = list(model.named_parameters())
    if kind == "DTensor":
        named = [("weight", distribute_tensor(model.weight, init_device_mesh("cpu", (WORLD,)), [Replicate()]))]
    elif kind == "unnamed":
        named = list(model.parameters())
    elif kind == "twice":
        named += named
    elif kind == "frozen":
        model.requires_grad_(False)
    elif kind == "no optimizer":
        opt = model
    DiLoCo(named, opt, **{"every": 4, **keywords})


@pytest.mark.parametrize(
    ("kind", "keywords", "message"),
    [
        ("", {"every": 0}, "every must be a whole number of at least 1, got 0"),
        ("", {"overlap": 4}, "overlap must be a whole number from 0 to every - 1 = 3, got 4"),
        ("", {"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ("", {"bits": 2}, r"bits must be one of \(32, 16, 8, 4\), got 2"),
        ("", {"lr": -1.0}, "DiLoCo: Invalid learning rate: -1.0"),
        ("", {"momentum": "high"}, "momentum must be a finite number, got 'high'"),
        ("", {"sparse": 1}, "sparse must be True or False, got 1"),
        ("", {"fragments": 3}, "fragments=3 is more than the model has layers and single parameters beside them, 2"),
        ("", {"fragments": "all"}, "fragments must be a number, or a list of lists of names, got 'all'"),
        ("", {"fragments": [["weight"]]}, "fragments: bias is in no fragment"),
        ("", {"fragments": [["*"], ["bias"]]}, "fragments: bias is in 2 fragments"),
        ("", {"fragments": [["*"], ["head"]]}, "fragments: 'head' fits no parameter that trains"),
        ("DTensor", {}, r"weight: it is spread over processes \(a DTensor\), which DiLoCo does not support"),
        ("unnamed", {}, r"DiLoCo takes names and parameters: model.named_parameters\(\)"),
        ("twice", {}, "two parameters are called weight"),
        ("frozen", {}, "no parameter trains"),
        ("no optimizer", {}, "opt must be the inner optimizer, got Linear"),
    ],
)
def test_bad_input(ranks: Ranks, kind: str, keywords: dict[str, Any], message: str) -> None:
    for result in ranks(refuse, kind, keywords):
        assert isinstance(result, ConfigError) and re.search(message, str(result)), result


def test_no_process_group() -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="there is no process group"):
        DiLoCo(model.named_parameters(), torch.optim.SGD(model.parameters()), every=4)


# --------------------------------------------------------------------------------------------------------------- fragments


def test_layers_go_round() -> None:
    sizes = {"embed": 50, **{f"model.layers.{layer}.{name}": 10 for layer in range(5) for name in ("up", "down")}, "head": 40}
    assert split(sizes, 2) == [
        [name for name in sizes if re.search(r"layers\.[024]\.", name)] + ["head"],
        ["embed"] + [name for name in sizes if re.search(r"layers\.[13]\.", name)],
    ]
    assert len(split(sizes, None)) == 2 and split({"weight": 1, "bias": 1}, None) == [["weight", "bias"]]
    assert split(sizes, [["embed", "head"], ["*.layers.*"]])[0] == ["embed", "head"]


def test_fragments_take_turns() -> None:
    due = {number: [step for step in range(1, 25) if is_due(step, number, 3, 10)] for number in range(3)}
    assert due == {0: [3, 13, 23], 1: [6, 16], 2: [10, 20]}
    assert [step for step in range(1, 9) if is_due(step, 0, 5, 4)] == [4, 8]

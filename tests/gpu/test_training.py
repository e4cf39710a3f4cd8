"""Training on a real GPU, generated Triton and all, against the same training on the CPU, op by op, which other tests hold
against oracles of their own."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import grass_compile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.inductor,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

WIDTH, HIDDEN, TOKENS, RANK, GAP = 32, 48, 24, 8, 3

CHOICES = [("uniform", "exact"), ("top", "exact"), ("top", "estimate")]

RULES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in ("AdamW", "AdamW8bit", "Adafactor", "Apollo", "Lion", "Muon", "SGD", "Sketchy")],
    ("AdamW", {"projection": "gaussian"}),
    ("AdamW", {"projection": "galore", "on_refresh": "reset"}),  # a basis has no sign, so moments may be carried over in another
]


class Block(nn.Module):
    """Attention in little and a gated MLP, with inputs whose norms are far apart, so that no choice of rows is a close one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        x = x + self.o((q @ k.mT / WIDTH**0.5).softmax(-1) @ v)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def blocks(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block()).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (x * torch.logspace(0, -1, WIDTH, dtype=torch.float64)).to(dtype)


def optimizer_of(model: nn.Module, name: str = "AdamW", **keywords: Any) -> Any:
    settings = dict(lr=1e-2, rank=RANK, update_proj_gap=GAP, seed=5, stagger=False, step_in_backward=True)
    return getattr(grass_compile, name)(model.named_parameters(), **{**settings, **keywords})


def train(model: nn.Module, optimizer: Any, forward: Callable[[Tensor], Tensor], steps: range) -> None:
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    for step in steps:
        forward(batch(step, dtype).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(device: str, steps: int = 8, dtype: torch.dtype = torch.float64, name: str = "AdamW", **keywords: Any) -> nn.Module:
    """A model trained by generated code on a GPU, op by op on a CPU."""
    torch._dynamo.reset()
    model = blocks(dtype).to(device)
    compiler = "inductor" if device == "cuda" else "aot_eager"
    optimizer = optimizer_of(model, name, **keywords)
    train(model, optimizer, torch.compile(model, backend="grass", options={"compiler": compiler}), range(steps))
    return model.cpu()


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest relative distance between corresponding weights, by what they have moved."""
    start = blocks()
    return max(
        float((p.detach().double() - q.double()).norm() / (q.detach().double() - s).norm())
        for p, q, s in zip(one.parameters(), other.parameters(), start.parameters(), strict=True)
        if not torch.equal(q.double(), s)
    )


@pytest.mark.parametrize("mode", [True, "auto", False])
@pytest.mark.parametrize(
    ("selection", "scores"), [("uniform", "exact"), ("top", "exact"), ("norm", "exact"), ("top", "estimate")]
)
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_selections_axes_and_modes(axis: str, selection: str, scores: str, mode: Any) -> None:
    keywords = dict(axis=axis, selection=selection, scores=scores, step_in_backward=mode)
    assert distance(trained("cuda", **keywords), trained("cpu", **keywords)) < 1e-7


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize(("name", "keywords"), RULES, ids=str)
def test_every_rule(name: str, keywords: dict[str, Any], axis: str) -> None:
    """In fp64, but for what Muon iterates in bf16, and codes of 8 bits at a border between two."""
    tolerance = {"Muon": 5e-2, "AdamW8bit": 2e-2, "Sketchy": 1e-3}.get(name, 1e-6)
    settings = {"axis": axis, "lr": 1e-3, **keywords}
    assert distance(trained("cuda", name=name, **settings), trained("cpu", name=name, **settings)) < tolerance


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_as_near_to_fp64_as_the_cpu(axis: str, dtype: torch.dtype) -> None:
    exact = trained("cpu", axis=axis)
    own, cpu = (distance(trained(device, dtype=dtype, axis=axis), exact) for device in ("cuda", "cpu"))
    assert own < 2 * cpu + 1e-6


@pytest.mark.parametrize(("selection", "scores"), CHOICES)
def test_cuda_graphs_are_right_and_are_not_recorded_again(selection: str, scores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mode="reduce-overhead"``: refreshes among the steps neither freeze a choice of rows nor add a recording a time."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    recorded = []
    record = CUDAGraphTreeManager.record_function

    def counted(self: Any, *args: Any) -> Any:
        recorded.append(args[1])
        return record(self, *args)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", counted)
    expected = trained("cpu", 24, selection=selection, scores=scores)
    torch._dynamo.reset()
    model = blocks().cuda()
    optimizer = optimizer_of(model, selection=selection, scores=scores)
    forward = torch.compile(model, backend="grass", mode="reduce-overhead")
    train(model, optimizer, forward, range(12))
    before = len(recorded)
    assert before > 0
    train(model, optimizer, forward, range(12, 24))
    assert len(recorded) == before
    assert distance(model.cpu(), expected) < 1e-7


def test_activations_offloaded_to_pinned_memory() -> None:
    """(What is saved is contiguous here: `save_on_cpu` forgets strides, and compiled backwards insist on them.)"""

    def mlp() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)).double()

    models = {"cpu": mlp(), "cuda": mlp().cuda()}
    for device, model in models.items():
        torch._dynamo.reset()
        optimizer = optimizer_of(model, step_in_backward="auto")
        compiled = torch.compile(model, backend="grass", options={"compiler": "inductor" if device == "cuda" else "aot_eager"})

        def forward(x: Tensor, compiled: Any = compiled, device: str = device) -> Tensor:
            with torch.autograd.graph.save_on_cpu(pin_memory=True) if device == "cuda" else contextlib.nullcontext():
                return compiled(x)  # type: ignore[no-any-return]

        train(model, optimizer, forward, range(8))
    for one, other in zip(models["cpu"].parameters(), models["cuda"].parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-8, atol=1e-10)


def test_a_stream_of_ones_own() -> None:
    expected = trained("cpu")
    torch._dynamo.reset()
    model = blocks().cuda()
    optimizer = optimizer_of(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(model, optimizer, torch.compile(model, backend="grass"), range(8))
    torch.cuda.current_stream().wait_stream(stream)
    assert distance(model.cpu(), expected) < 1e-7


def test_grad_scaler_skips_what_overflows() -> None:
    """Autocast to fp16 with `torch.amp.GradScaler`: a step whose gradients overflow moves nothing, the others are as without."""
    model = blocks(torch.float32).cuda()
    optimizer = optimizer_of(model, step_in_backward="auto")
    forward = torch.compile(model, backend="grass")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    losses = []
    for step in range(8):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cuda", torch.float16):
            loss = forward(batch(step, torch.float32).cuda()).square().mean()
        losses.append(loss.item())
        if step == 4:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert not any(moved) if step == 4 else sum(moved) > len(moved) / 2, step
    assert losses[-1] < losses[0]


def test_out_of_memory_in_a_backward_moves_weights_once_or_not() -> None:
    """The step is repeated with a smaller batch after the memory ran out; what had moved by then is told and moves no second
    time."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(6))).cuda()
    twin = copy.deepcopy(model)
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=512, lr=1e-3, weight_decay=0.0, step_in_backward=True)
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    forward = torch.compile(model, backend="grass", dynamic=True)

    def losses(rows: int) -> Iterator[tuple[Any, Any]]:
        x = torch.randn(rows, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(rows))
        yield forward, x
        yield twin, x

    def step(rows: int) -> None:
        for run, x in losses(rows):
            run(x).square().mean().backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()

    for rows in (256, 300, 512):
        step(rows)
    loss = forward(torch.randn(400_000, 512, device="cuda")).square().mean()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (900 << 20)) / total)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del loss
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    if moved:
        with pytest.raises(grass_compile.StateError, match=r"weight"):
            step(256)
        return
    optimizer.zero_grad()
    step(256)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-3, atol=1e-4)


def test_no_full_gradient_is_ever_allocated() -> None:
    """A regular fused step of wide layers needs less beyond weights, state and activations than half of one layer's gradient."""
    width, layers = 4096, 6
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(torch.bfloat16).cuda()
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=64, lr=1e-4, step_in_backward=True, update_proj_gap=1000)
    forward = torch.compile(model, backend="grass")
    x = torch.randn(64, width, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() - before < 2 * width * width / 2


@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_goes_on_on_the_other_device(saved: str, loaded: str) -> None:
    expected = trained("cpu", 10)
    compilers = {"cuda": "inductor", "cpu": "aot_eager"}
    torch._dynamo.reset()
    model = blocks().to(saved)
    optimizer = optimizer_of(model)
    train(model, optimizer, torch.compile(model, backend="grass", options={"compiler": compilers[saved]}), range(5))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch._dynamo.reset()
    other = blocks().to(loaded)
    resumed = optimizer_of(other)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(other, resumed, torch.compile(other, backend="grass", options={"compiler": compilers[loaded]}), range(5, 10))
    assert distance(other.cpu(), expected) < 1e-7


def test_moved_to_the_gpu_after_the_optimizer_was_made() -> None:
    expected = trained("cpu")
    torch._dynamo.reset()
    model = blocks()
    optimizer = optimizer_of(model)
    model.cuda()
    train(model, optimizer, torch.compile(model, backend="grass"), range(8))
    assert distance(model.cpu(), expected) < 1e-7


def test_blocks_compiled_one_by_one_under_ddp_with_nccl(tmp_path: Any) -> None:
    """A world of one: NCCL's collectives are launched from the compiled backward."""
    expected = trained("cpu")
    torch._dynamo.reset()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = blocks().cuda()
        for block in model:
            block.compile(backend="grass")  # type: ignore[operator]
        optimizer = optimizer_of(model)
        wrapped = DistributedDataParallel(model)
        train(model, optimizer, wrapped, range(8))
        assert distance(model.cpu(), expected) < 1e-7
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def test_stochastic_rounding_is_unbiased_on_a_gpu() -> None:
    """bf16 weights that move by far less than they are rounded to, on average get where fp32 weights do."""
    torch.manual_seed(0)
    weight = torch.ones(256, 64)
    moves = []
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        model = nn.Linear(64, 256, bias=False).cuda().to(dtype)
        with torch.no_grad():
            model.weight.copy_(weight)
        optimizer = grass_compile.SGD(
            model.named_parameters(), rank=64, lr=1e-3, stochastic_rounding=dtype is torch.bfloat16, step_in_backward=True
        )
        forward = torch.compile(model, backend="grass")
        for _ in range(20):
            forward(torch.ones(4, 64, device="cuda", dtype=dtype)).float().sum().mul(0.01).backward()
            optimizer.step()
            optimizer.zero_grad()
        moves.append(float((1 - model.weight.detach().float()).mean()))
    assert moves[0] > 0 and abs(moves[1] / moves[0] - 1) < 0.1

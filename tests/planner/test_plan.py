"""`grass_compile.plan` against what lives when the same model really trains."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grass_compile
from benchmarks import measure
from grass_compile import ConfigError
from grass_compile.planner import questions
from grass_compile.planner.request import Request
from grass_compile.planner.result import Plan

transformers = pytest.importorskip("transformers", reason="builds its models")

BATCH, SEQ, RANK = 2, 64, 16
FIELDS = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("planner") / "small.json"
    path.write_text(json.dumps(FIELDS))
    return str(path)


def plan(config: str, **keywords: Any) -> Plan:
    given: dict[str, Any] = {"batch": BATCH, "seq": SEQ, "dtype": "fp32", "device": "cpu"}
    return grass_compile.plan(config, **{**given, **keywords})


def lived(config: str, optimizer: str, **keywords: Any) -> tuple[int, torch.optim.Optimizer]:
    """The most bytes that torch's allocator held in four steps, and the optimizer after them."""
    fields = {key: value for key, value in json.loads(Path(config).read_text()).items() if key != "model_type"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, use_cache=False)).train()
    for layer in model.model.layers:
        layer.compile(backend="grass")
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.long)

    def train() -> torch.optim.Optimizer:
        made = getattr(grass_compile, optimizer)(model.named_parameters(), lr=1e-3, rank=RANK, **keywords)
        for _ in range(4):
            model(input_ids=tokens, labels=tokens).loss.backward()
            made.step()
            made.zero_grad()
        return made  # type: ignore[no-any-return]

    train()
    gc.collect()
    own = measure.model_bytes(model)
    made: list[torch.optim.Optimizer] = []
    peak = measure.allocated_peak(lambda: made.append(train()))
    return own + peak, made[0]


@pytest.mark.inductor
def test_a_plan_is_what_lives(config: str) -> None:
    """Within 1 %, though everything is so small that bookkeeping counts; and the state is that of the real optimizer."""
    planned = plan(config, rank=RANK)
    measured, optimizer = lived(config, "AdamW")
    assert planned.peak_bytes == pytest.approx(measured, rel=0.01)
    compact = {p: state for p, state in optimizer.state.items() if "index" in state}
    sizes = [
        sum(t.nbytes for t in state.values() if isinstance(t, Tensor))
        for states in (compact.values(), (s for p, s in optimizer.state.items() if p not in compact))
        for state in states
    ]
    assert planned.bytes["compact state"] == sum(sizes[: len(compact)]) > 0
    assert planned.bytes["dense state"] == sum(sizes[len(compact) :]) > 0


@pytest.mark.inductor
def test_kinds_add_up_and_layers_too(config: str) -> None:
    planned = plan(config, rank=RANK)
    assert sum(planned.bytes.values()) == planned.peak_bytes == max(max(step.values()) for step in planned.steps)
    assert sum(sum(kinds.values()) for kinds in planned.layers.values()) == planned.peak_bytes - planned.bytes["allocator slack"]
    one, other = (planned.layers[f"model.layers.{number}"] for number in range(2))
    assert one["compact state"] == other["compact state"] > 0
    assert str(planned.peak_bytes) in json.dumps(planned.as_dict())


@pytest.mark.inductor
def test_a_refresh_by_whole_gradients_and_checkpoints_are_seen(config: str) -> None:
    columns = plan(config, rank=RANK)
    scored = plan(config, rank=RANK, axis="columns", selection="top", update_proj_gap=2, stagger=False)
    checkpointed = plan(config, rank=RANK, checkpointing=True)
    refreshes = [step["backward"] for step in scored.steps]
    assert refreshes[2] > refreshes[3]  # the third is a refresh, whose gradients are whole
    assert checkpointed.saved_bytes < columns.saved_bytes / 2
    assert checkpointed.steps[-1]["backward"] < columns.steps[-1]["backward"]


@pytest.mark.inductor
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to generate code for a GPU")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a build of torch for GPUs asks its own driver")
def test_a_plan_for_a_gpu_that_is_not_there(config: str) -> None:
    here, there = (plan(config, rank=RANK, device=device) for device in ("cpu", "cuda"))
    assert there.bytes["parameters"] == here.bytes["parameters"]
    assert there.bytes["allocator slack"] > 0 == here.bytes["allocator slack"]
    assert there.peak_bytes == pytest.approx(here.peak_bytes, rel=0.1)


@pytest.mark.inductor
def test_others(config: str) -> None:
    """Their states by hand; LoRA's is that of its adapters."""
    plans = questions.compare(Request(config, BATCH, SEQ, "AdamW", "fp32", "cpu", keywords=(("rank", RANK),)))
    numbers = plans["grass"].parameters
    small = 5 * 64 + 4 * 32 * 64  # norms, keys and values are below 4,096 numbers
    assert plans["adamw"].bytes["dense state"] == 2 * 4 * numbers
    assert plans["adamw8bit"].bytes["dense state"] == (numbers - small) * (2 + 8 / 256) + 8 * small
    assert plans["flashoptim"].bytes["dense state"] == 3 * numbers and plans["flashoptim"].bytes["dense gradients"] == 0
    assert plans["adamw8bit"].peak_bytes < plans["adamw"].peak_bytes
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176)]
    low_rank = sum((2 * max(shape) + min(shape)) * RANK for shape in shapes)
    rest = 2 * (2 * 512 * 64 + 5 * 64)
    assert plans["galore"].bytes["dense state"] == 4 * (2 * low_rank + rest)
    adapters = 2 * sum(sum(shape) * RANK for shape in shapes)
    assert plans["lora"].parameters == numbers + adapters
    assert plans["lora"].bytes["dense state"] == pytest.approx(2 * 4 * adapters, rel=1e-2)


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class Small(nn.Module):
    """Blocks, and no loss."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def bf16_inputs() -> dict[str, Tensor]:
    return {"x": torch.zeros(10, 32, dtype=torch.bfloat16)}


def inputs() -> dict[str, Tensor]:
    return {"x": torch.zeros(10, 32)}


def planned(model: nn.Module, device: str = "cpu") -> Plan:
    return grass_compile.plan(
        model, batch=1, seq=1, inputs=inputs, loss=lambda y: y.square().mean(), dtype=None, device=device, rank=4
    )


def trained(steps: int = 4, begun: threading.Event | None = None) -> list[list[float]]:
    """Weights of `Small`, block by block through Inductor. (No biases: torch's own AdamW computes on tensors what it computes on
    numbers otherwise while any thread compiles, and rounds differently.)"""
    torch.manual_seed(0)
    model = Small(bias=False)
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, seed=1)
    for block in model.blocks:
        block.compile(backend="grass")
    for step in range(steps):
        if step == 5 and begun is not None:
            begun.set()
        model(torch.full((10, 32), 0.1 * (step % 7))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().flatten().tolist() for parameter in model.parameters()]


@pytest.mark.inductor
def test_planning_leaves_a_module_as_it_was() -> None:
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert planned(model).bytes["parameters"] == sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.inductor
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.exhaustive)])
def test_a_script_that_plans_and_then_trains(device: str) -> None:
    """In a new process, in which planning is what first imports Inductor: what is compiled for it never runs in training."""
    code = f"""
import json, sys
from tests.planner.test_plan import Small, planned, trained
planned(Small(), {device!r})
print(json.dumps(trained()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    torch._dynamo.reset()
    assert json.loads(done.stdout.splitlines()[-1]) == trained()


@pytest.mark.inductor
def test_another_thread_trains_meanwhile() -> None:
    """Planning takes its compiled graphs away half-way, and it compiles them again, for real."""
    right = trained(1000)
    torch._dynamo.reset()
    found: list[list[list[float]]] = []
    begun = threading.Event()
    thread = threading.Thread(target=lambda: found.append(trained(1000, begun)))
    thread.start()
    begun.wait()
    planned(Small())
    thread.join()
    assert found == [right]


class Reads(Small):
    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1:
            return x
        return super().forward(x)


class Selects(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x[:, 0] > 0])


@pytest.mark.inductor
def test_a_forward_that_reads_numbers_says_so() -> None:
    keywords: dict[str, Any] = {
        "batch": 1,
        "seq": 1,
        "inputs": inputs,
        "loss": torch.mean,
        "dtype": None,
        "device": "cpu",
        "rank": 4,
    }
    assert any("reads numbers" in note for note in grass_compile.plan(Reads(), **keywords).notes)
    with pytest.raises(ConfigError, match="cannot be planned without data"):
        grass_compile.plan(Selects(), **keywords)


@pytest.mark.inductor
def test_states_are_counted_in_the_dtype_that_is_planned_and_of_what_is_trained() -> None:
    keywords: dict[str, Any] = {"batch": 1, "seq": 1, "inputs": bf16_inputs, "loss": torch.mean, "dtype": "bf16", "device": "cpu"}
    module = Small()
    module.blocks[0].requires_grad_(False)
    trained = 2 * (32 * 32 + 32)
    assert grass_compile.plan(module, optimizer="adamw", **keywords).bytes["dense state"] == 2 * 2 * trained
    lora = grass_compile.plan(module, optimizer="lora", rank=0.25, **keywords)
    adapters = 3 * 2 * 32 * 8
    assert lora.bytes["dense state"] == pytest.approx(2 * 4 * adapters, rel=0.01)  # in fp32, as peft has them
    ddp = grass_compile.plan(module, optimizer="adamw", world=2, sharding="ddp", **keywords)
    assert ddp.sent["all-reduce of gradients"] == 2 * trained


@pytest.mark.inductor
def test_gpt2_has_linear_layers_of_another_name(tmp_path: Path) -> None:
    path = tmp_path / "gpt2.json"
    fields = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 128,
        "n_positions": SEQ,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    path.write_text(json.dumps({"model_type": "gpt2", **fields}))
    lora = plan(str(path), optimizer="lora", rank=8)
    per_block = 8 * sum(sum(shape) for shape in ((64, 192), (64, 64), (64, 256), (256, 64)))
    assert lora.bytes["dense state"] == pytest.approx(2 * 4 * 2 * per_block, rel=0.01)


@pytest.mark.inductor
def test_a_rank_of_eight(config: str) -> None:
    """The weights and the state of one process in eighths, what is gathered beside, and what is sent by the shapes."""
    one, many = plan(config, rank=RANK), plan(config, rank=RANK, world=8, sharding="fsdp2")
    for kind in ("parameters", "compact state", "dense state"):
        assert many.bytes[kind] == -(-one.bytes[kind] // 8)
    weights = [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176)]
    compact = 2 * sum(m * RANK for m, _ in weights)
    dense = 2 * 512 * 64 + 5 * 64
    assert many.sent["reduce-scatter of gradients"] == 7 * 4 * (compact + dense) // 8
    assert not one.sent and "are sent by each rank" in str(many)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 65}, "above the width of the model, 64"),
    "no rank": ({}, "rank= is missing"),
    "optimizer": ({"optimizer": "adam", "rank": 4}, "must be one of this package's"),
    "keyword": ({"rank": 4, "ranks": 5}, "ranks"),
    "a keyword of nobody": ({"optimizer": "adamw", "ranks": 5}, "ranks= is not read"),
    "a keyword beside a function": ({"optimizer": lambda model: None, "rank": 5}, "rank= is not read"),
    "rank of others": ({"optimizer": "galore", "rank": -5}, "rank"),
    "rank in words": ({"optimizer": "lora", "rank": "many"}, "rank"),
    "a set": ({"rank": 4, "betas": {0.9}}, "betas"),
    "inputs": ({"rank": 4, "inputs": {}}, "inputs= must be a function"),
    "inputs of another": (
        {"rank": 4, "inputs": lambda: {"pixels": torch.zeros(1)}},
        "cannot be trained on tensors without memory",
    ),
    "others by tensor parallelism": ({"optimizer": "adamw", "world": 2, "sharding": "tp"}, "for the optimizers of this package"),
    "batch": ({"rank": 4, "batch": 0}, "batch=0 must be a positive integer"),
    "dtype": ({"rank": 4, "dtype": "fp8"}, "dtype='fp8'"),
    "device": ({"rank": 4, "device": "tpu"}, "device='tpu'"),
    "compile": ({"rank": 4, "compile": "some"}, "compile='some'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, config: str) -> None:
    keywords, says = BAD[name]
    with pytest.raises(ConfigError, match=says):
        plan(config, **keywords)


def test_a_model_without_blocks_is_compiled_whole() -> None:
    with pytest.raises(ConfigError, match="compile='whole'"):
        grass_compile.plan(nn.Linear(8, 8), batch=1, seq=1, dtype=None, device="cpu", rank=2)


@pytest.mark.inductor
def test_a_model_that_changes_is_planned_anew(tmp_path: Path) -> None:
    """A module between two plans, and a file."""
    keywords: dict[str, Any] = {"batch": 1, "seq": 1, "inputs": inputs, "loss": torch.mean, "dtype": None, "device": "cpu"}
    module = Small()
    before = grass_compile.plan(module, rank=4, exclude=["*2*"], **keywords)
    module.blocks.append(Block())
    after = grass_compile.plan(module, rank=4, exclude=["*2*"], **keywords)
    assert after.parameters - before.parameters == 32 * 32 + 32
    assert any("blocks.2" in note for note in after.notes)

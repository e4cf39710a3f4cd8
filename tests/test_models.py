"""Real architectures from transformers, unmodified, with every eligible weight projected, against the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import grass_compile

from . import paper
from .harness import pair

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2) -> nn.Module:
    """A LLaMA."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=88, num_hidden_layers=layers, num_attention_heads=2,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """A GPT-2 of two layers: ``Conv1D`` weights, and an embedding tied to the output layer."""
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=32, use_cache=False, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """A BERT of two layers."""
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


ELIGIBLE = {"llama": (llama, 14), "gpt2": (gpt2, 8), "bert": (bert, 13)}


def check(model: nn.Module, count: int, compiler: str, axis: str, steps: int, tolerance: float) -> None:
    """Train beside the oracle over two refreshes; losses stay equal, and so do the weights."""
    run = pair(model, [IDS], rank=8, axis=axis, compiler=compiler, on_refresh="carry", weight_decay=0.1)
    assert len(run.oracle.projected) == count
    for _ in range(steps):
        own, expected = run.step(lambda output: output.loss, IDS, labels=IDS)
        assert own == pytest.approx(expected, rel=max(tolerance, 1e-6))
    assert run.difference() < tolerance
    projected = [dict(model.named_parameters())[name] for name in run.oracle.projected]
    assert all(p.grad is None and "index" in run.optimizer.state[p] for p in projected)


SETTINGS = {("llama", "auto"), ("gpt2", "columns"), ("bert", "columns")}


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        pytest.param(name, axis, marks=() if (name, axis) in SETTINGS else pytest.mark.exhaustive)
        for name in ELIGIBLE
        for axis in ("rows", "columns", "auto")
    ],
)
def test_model_equals_oracle(name: str, axis: str) -> None:
    build, count = ELIGIBLE[name]
    check(build().double(), count, "aot_eager", axis, steps=7, tolerance=1e-6)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor's own attention fails in float64 there")
@pytest.mark.parametrize(
    ("build", "count"),
    [
        pytest.param(functools.partial(llama, layers=1), 7, id="llama"),
        pytest.param(gpt2, 8, id="gpt2", marks=pytest.mark.exhaustive),
    ],
)
def test_model_equals_oracle_under_inductor(build: Callable[[], nn.Module], count: int) -> None:
    check(build().double(), count, "inductor", "auto", steps=7, tolerance=1e-6)


def test_report_names_the_reasons() -> None:
    model = gpt2()
    optimizer = paper.AdamW(model.named_parameters(), rank=8)
    report = grass_compile.explain(model, IDS, labels=IDS, optimizer=optimizer)
    assert "tied weights" in report["transformer.wte.weight"].reason
    assert "embedding table" in report["transformer.wpe.weight"].reason
    assert report["transformer.h.0.ln_1.weight"].reason == "it has 1 dimension; only matrices can be projected"
    assert "cost per step: rows" in report["transformer.h.0.mlp.c_fc.weight"].reason
    assert "8 of 28 parameters projected" in str(report)
    dense = sum(p.numel() for p in model.parameters())
    compact = sum(
        p.numel() if not report[name].projected else p.numel() // p.shape[report[name].dim] * report[name].rank
        for name, p in model.named_parameters()
    )
    assert report.gradient_bytes.dense == 4 * dense and report.gradient_bytes.compact == 4 * compact
    assert report.state_bytes.compact == 8 * compact


@pytest.mark.parametrize("blockwise", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_blocks_share_one_graph_and_two_models_do(blockwise: bool) -> None:
    runs = [pair(llama().double(), [IDS], rank=8, axis="columns") for _ in range(2)]
    torch._dynamo.reset()
    for run in runs:
        if blockwise:
            for layer in run.model.model.layers:
                layer.compile(backend="grass", options={"compiler": "aot_eager"})
            run.compiled = run.model
        else:
            run.compiled = torch.compile(run.model, backend="grass", options={"compiler": "aot_eager"})
    before = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    for _ in range(7):
        for run in runs:
            run.step(lambda output: output.loss, IDS, labels=IDS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert [run.difference() for run in runs] == pytest.approx([0.0, 0.0], abs=1e-6)  # the models compute their loss in fp32
    assert all(len(run.oracle.projected) == 14 for run in runs)


def test_blocks_of_different_rank_get_their_own_variants() -> None:
    torch.manual_seed(0)
    model = llama().double()
    layers = model.model.layers
    rest = [(n, p) for n, p in model.named_parameters() if "layers" not in n]
    groups = [
        {"params": [(f"layers.0.{n}", p) for n, p in layers[0].named_parameters()], "rank": 4, "axis": "rows"},
        {"params": [(f"layers.1.{n}", p) for n, p in layers[1].named_parameters()], "rank": 8, "axis": "columns"},
        {"params": rest, "rank": None},
    ]
    optimizer = paper.AdamW(groups, lr=1e-2, update_proj_gap=2)
    for layer in layers:
        layer.compile(backend="grass", options={"compiler": "aot_eager"})
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[layers[0].mlp.up_proj.weight]["exp_avg"].shape == (4, 32)
    assert optimizer.state[layers[1].mlp.up_proj.weight]["exp_avg"].shape == (88, 8)


def test_reasons_survive_training() -> None:
    model = llama()
    optimizer = paper.AdamW(model.named_parameters(), rank=8)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    compiled(IDS, labels=IDS).loss.backward()
    optimizer.step()
    report = grass_compile.explain(compiled, IDS, labels=IDS, optimizer=optimizer)
    assert all("cost per step" in row.reason for row in report.projected) and len(report.projected) == 14

"""What `grass_compile.plan` says, against what really lived.

    python -m benchmarks.planner                                  # all architectures, about an hour on two cores
    python -m benchmarks.planner --architectures llama gpt2
    python -m benchmarks.planner --device cuda                    # against torch.cuda.max_memory_allocated, on a GPU

Small models of `transformers`, trained for four steps: AdamW along columns (the default) and along rows by exact scores (the
paper's, with refreshes), Muon, and dense AdamW; compiled as a whole, block by block, and block by block with checkpoints.

On a CPU, what really lived is the trace of torch's allocator (`torch.profiler` with ``profile_memory``), which sees every tensor,
those that library kernels allocate inside included. Steps are run once before, so that nothing is compiled while it looks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import grass_compile
from benchmarks import measure, record
from grass_compile.planner import plan
from grass_compile.planner.models import checkpoint, load
from grass_compile.planner.training import blocks_of

WIDTH, HEADS, LAYERS, VOCABULARY, RANK, BATCH, SEQ, STEPS = 256, 4, 2, 4096, 32, 4, 128, 4

PLAIN = {
    "hidden_size": WIDTH,
    "intermediate_size": 704,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "num_key_value_heads": 2},
    "mistral": {**PLAIN, "num_key_value_heads": 2},
    "qwen2": {**PLAIN, "num_key_value_heads": 2},
    "qwen3": {**PLAIN, "num_key_value_heads": 2, "head_dim": 64},
    "gemma": {**PLAIN, "num_key_value_heads": 1, "head_dim": 64},
    "gemma2": {**PLAIN, "num_key_value_heads": 1, "head_dim": 64},
    "phi3": PLAIN,
    "olmo2": PLAIN,
    "gpt_neox": PLAIN,
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {
        "hidden_size": WIDTH,
        "ffn_dim": 1024,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "word_embed_proj_dim": WIDTH,
    },
    "bert": PLAIN,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "columns": ("AdamW", {"rank": RANK}),
    "rows": ("AdamW", {"rank": RANK, "preset": "paper", "update_proj_gap": 2}),
    "muon": ("Muon", {"rank": RANK}),
    "dense": ("adamw", {}),
}
MODES = {"whole": ("whole", False), "blocks": ("blocks", False), "checkpointed": ("blocks", True)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "planner" / "cpu.json")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def config_file(name: str, folder: Path) -> str:
    """A configuration as a file, which the planner reads like a user's."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"model_type": name, **ARCHITECTURES[name]}))
    return str(path)


def optimizer_of(method: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the plan supposes."""
    name, keywords = METHODS[method]
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True)
    made: torch.optim.Optimizer = getattr(grass_compile, name)(model.named_parameters(), lr=1e-3, **keywords)
    return made


def measured(config: str, method: str, mode: str, device: str) -> int:
    """The most bytes that lived in four steps."""
    torch._dynamo.reset()
    compile, checkpointing = MODES[mode]
    model = load(config, torch.float32, checkpointing)
    model = model.to_empty(device=device).train()
    model.tie_weights()  # `to_empty` makes two of a tied weight
    if checkpointing:
        checkpoint(model)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.zeros_(tensor) if not tensor.is_floating_point() else torch.nn.init.normal_(tensor, std=0.02)
    for name in blocks_of(model) if compile == "blocks" else ():
        model.get_submodule(name).compile(backend="grass")
    if compile == "whole":
        model.compile(backend="grass")
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.long, device=device)

    def train() -> None:
        optimizer = optimizer_of(method, model)
        for _ in range(STEPS):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train()
    gc.collect()
    own = measure.model_bytes(model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train()
        return torch.cuda.max_memory_allocated()
    return own + measure.allocated_peak(train)


def planned(config: str, method: str, mode: str, device: str) -> dict[str, Any]:
    """What the planner says."""
    compile, checkpointing = MODES[mode]
    name, keywords = METHODS[method]
    found = plan(
        config,
        batch=BATCH,
        seq=SEQ,
        optimizer=name,
        dtype="fp32",
        device=device,
        compile=compile,
        checkpointing=checkpointing,
        **keywords,
    )
    return {"planned": found.peak_bytes, "phase": found.phase, "bytes": dict(found.bytes)}


def cells(arguments: argparse.Namespace) -> None:
    """All cells of one architecture, in this process; a line of JSON for each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(os.environ["PLANNER_FOLDER"])
    config = config_file(arguments.inside, folder)
    for mode in arguments.modes:
        for method in arguments.methods:
            cell: dict[str, Any] = {"architecture": arguments.inside, "method": method, "mode": mode}
            try:
                cell |= planned(config, method, mode, arguments.device)
                cell["measured"] = measured(config, method, mode, arguments.device)
                cell["ratio"] = cell["planned"] / cell["measured"]
            except Exception as error:  # one cell that fails is a finding, and not the end of the others
                cell["error"] = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps(cell), flush=True)


def main() -> None:
    """A process for each architecture."""
    arguments = parse()
    if arguments.inside:
        cells(arguments)
        return
    import tempfile

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.architectures:
            command = [sys.executable, "-m", "benchmarks.planner", "--inside", name, "--device", arguments.device]
            command += ["--methods", *arguments.methods, "--modes", *arguments.modes]
            environment = {**os.environ, "PLANNER_FOLDER": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done = subprocess.run(command, cwd=record.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            found += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            report(found[-len(arguments.methods) * len(arguments.modes) :])
            record.write(arguments.out, "planner", arguments, {"cells": found})
    ratios = [cell["ratio"] for cell in found if "ratio" in cell]
    near = sum(abs(ratio - 1) <= 0.03 for ratio in ratios)
    print(f"{near} of {len(ratios)} within 3 %; {min(ratios):.4f} to {max(ratios):.4f}, median {statistics.median(ratios):.4f}")
    print(f"{sum('error' in cell for cell in found)} failed")


def report(found: list[dict[str, Any]]) -> None:
    """A line for each cell."""
    rows = []
    for cell in found:
        what = (cell["architecture"], cell["method"], cell["mode"])
        if "error" in cell:
            rows.append((*what, "", "", cell["error"][:80]))
        else:
            rows.append((*what, f"{cell['planned'] / 1e6:.2f}", f"{cell['measured'] / 1e6:.2f}", f"{cell['ratio']:.4f}"))
    print(record.table(("architecture", "method", "compiled", "planned, MB", "measured, MB", "ratio"), rows), flush=True)


if __name__ == "__main__":
    main()

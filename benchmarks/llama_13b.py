"""13 billion parameters in bf16 on 40 GB: `python -m benchmarks.llama_13b` trains Hugging Face's LLaMA-13B, from random weights,
on the bytes of Python's standard library, in a process that may take no more of the GPU's memory than `--memory`.

Token batch 256, rank 128, AdamW with `grass_compile`'s defaults: unmodified model code, compiled layer by layer. Prints the loss
and the peaks as it goes. `--layers`, `--hidden` and `--device cpu` make it small enough for a look without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import grass_compile
from benchmarks import measure, record
from benchmarks.gpu import GIB, peak

sys.path.insert(0, str(record.ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from corpus import load_corpus

VOCABULARY = 32_000


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_13b", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=float, default=40e9, help="bytes that this process may take (default 40e9)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--optimizer", default="AdamW", choices=("AdamW", "AdamW8bit", "Muon"))
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> Any:
    """LLaMA with the fields of the paper (Touvron et al., arXiv 2302.13971, table 2), made where it trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 27 // 10,  # 13,824
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        max_position_embeddings=2048,
        use_cache=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def main() -> int:
    """Train, print, write. Returns 1 if the loss has not fallen."""
    options = parse()
    on_gpu = options.device != "cpu"
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory / total))
    model = build(options)
    number = sum(p.numel() for p in model.parameters())
    optimizer = getattr(grass_compile, options.optimizer)(model.named_parameters(), lr=options.lr, rank=options.rank)
    for layer in model.model.layers:
        layer.compile(backend="grass")
    text = load_corpus().train
    losses: list[float] = []
    seconds: list[float] = []
    most: list[int] = []
    for step in range(options.steps):
        ids = text[step * options.tokens : (step + 1) * options.tokens].long()[None].to(options.device)
        measure.wait_for(options.device)
        start = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        measure.wait_for(options.device)
        seconds.append(time.perf_counter() - start)
        most.append(peak(options.device))
        if step < 4 or step % 10 == 9:
            print(f"step {step}: loss {losses[-1]:.3f}, {seconds[-1]:.3f} s, peak {most[-1] / GIB:.2f} GiB", flush=True)
    reserved = torch.cuda.max_memory_reserved() if on_gpu else None
    result = {
        "parameters": number,
        "fused": bool(getattr(optimizer, "fused", False)),
        "loss_first_ten": statistics.mean(losses[:10]),
        "loss_last_ten": statistics.mean(losses[-10:]),
        "step_seconds": statistics.median(seconds[5:] or seconds),
        "peak_allocated": max(most),
        "peak_allocated_after_three_steps": max(most[3:] or most),
        "peak_reserved": reserved,
        "weights": measure.model_bytes(model),
        "state": measure.storage_bytes(measure.state_tensors(optimizer)),
        "losses": losses,
    }
    print({name: value for name, value in result.items() if name != "losses"})
    record.write(record.RESULTS / "llama_13b.json" if options.out is None else options.out, "llama_13b", options, result)
    return 0 if result["loss_last_ten"] < result["loss_first_ten"] else 1


if __name__ == "__main__":
    sys.exit(main())

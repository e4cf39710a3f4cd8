"""What Streaming DiLoCo sends and how well it learns, against `DistributedDataParallel`, on the demo's model and text.

    python -m benchmarks.diloco                                   # two workers
    python -m benchmarks.diloco --workers 4 --methods ddp moved-4

With as many workers, every method sees the same tokens: each worker has batches of four windows, half of the demo's. `ddp`
averages the gradients of every step, compact ones where weights are projected. `whole-32` is DiLoCo with whole weights in fp32;
`moved-...` sends only the columns that have moved, with so many bits a number.

Bytes are what one worker sends to others. For DDP they follow from the shapes: an all-reduce of `B` bytes over `N` workers sends
`2 (N - 1) / N B` from each. DiLoCo counts its own, headers, scales and padding included. The loss is that of the outer weights on
held-out text, as in the paper, with that of the first worker's own beside it; one seed, so differences of a hundredth say
nothing. `--overlap` steps are added at the end, in which the last message arrives.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.record import RESULTS, ROOT, table, write

sys.path.insert(0, str(ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from corpus import even_windows, load_corpus, sample_windows
from grass_compile.distributed import DiLoCo
from optimizers import build_optimizer
from rates import with_best_rates
from training import TrainConfig, build_model, evaluate, lr_share

METHODS: dict[str, tuple[bool, int] | None] = {
    "ddp": None,
    "whole-32": (False, 32),
    "moved-32": (True, 32),
    "moved-8": (True, 8),
    "moved-4": (True, 4),
}
"""Whether only what has moved is sent, and bits a number; None for DDP."""


@dataclass(frozen=True)
class Settings:
    """One run, as each of its workers is told."""

    config: TrainConfig
    method: str
    workers: int
    every: int
    fragments: int
    overlap: int
    lr: float


def main() -> None:
    options = parse()
    grass = TrainConfig(lr=0.0, rank=options.rank, optimizer=options.optimizer, steps=options.steps, validation_windows=32)
    config, _ = with_best_rates(grass)
    runs = {}
    for method in options.methods:
        settings = Settings(config, method, options.workers, options.every, options.fragments, options.overlap, options.lr)
        runs[method] = run(settings)
        print(json.dumps({method: {key: value for key, value in runs[method].items() if key != "curve"}}), flush=True)
    print(table(["method", "loss", "own loss", "MB sent", "MB in a step", "s"], [line(*entry) for entry in runs.items()]))
    name = f"diloco-{options.optimizer.lower()}-r{options.rank}-w{options.workers}.json"
    write(options.out or RESULTS / name, "diloco", options, {"config": vars(config), "runs": runs})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=100, help="default 100")
    parser.add_argument("--rank", type=int, default=32, help="columns (default 32, an eighth of the width)")
    parser.add_argument("--optimizer", choices=("AdamW", "Muon"), default="AdamW")
    parser.add_argument("--every", type=int, default=20, help="steps from one message of a fragment to the next (default 20)")
    parser.add_argument("--fragments", type=int, default=2, help="default 2")
    parser.add_argument("--overlap", type=int, default=2, help="steps for which a message may travel (default 2)")
    parser.add_argument("--lr", type=float, default=0.4, help="of the outer optimizer (default 0.4)")
    parser.add_argument("--out", type=Path, help="JSON file (default: a name made of the settings, in results/)")
    return parser.parse_args()


def line(method: str, found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    losses = [f"{found['loss']:.4f}", f"{found['own_loss']:.4f}"]
    sizes = [f"{found['bytes'] / 1e6:.2f}", f"{found['peak_bytes'] / 1e6:.3f}"]
    return [method, *losses, *sizes, f"{found['seconds']:.0f}"]


def run(settings: Settings) -> dict[str, Any]:
    """Train on fresh processes; what the first worker has measured."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (settings, folder), settings.workers)  # type: ignore[no-untyped-call]
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
        return found


def worker(rank: int, settings: Settings, folder: str) -> None:
    """One process of a run."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch._dynamo.config.optimize_ddp = False  # one graph, as without DDP
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.workers)
    found = train(rank, settings)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def train(rank: int, settings: Settings) -> dict[str, Any]:
    """Train, and measure."""
    config, began = settings.config, time.perf_counter()
    corpus = load_corpus(config.text)
    model: Any = build_model(config)
    opt = build_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: lr_share(step, config))
    diloco = diloco_of(model, opt, settings)
    compiled: Any = torch.compile(model if diloco is not None else DistributedDataParallel(model), backend="grass")
    part = replace(config, batch_size=config.batch_size // 2)
    losses, sent = [], [0]
    extra = settings.overlap if diloco is not None else 0
    for _, ids in zip(tqdm(range(config.steps + extra), disable=rank > 0), own_batches(corpus, part, rank), strict=False):
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if diloco is not None:
            diloco.step()
            sent.append(diloco.bytes_sent)
    if diloco is None:
        sent = [step * gradient_bytes(model, opt, settings.workers) for step in range(config.steps + 1)]
    validation = even_windows(corpus.held_out, config.validation_windows, config.sequence_length)
    own_loss = evaluate(model, validation)
    if diloco is not None:
        model.load_state_dict(diloco.outer, strict=False)
    return {
        "loss": evaluate(model, validation),
        "own_loss": own_loss,
        "bytes": sent[-1],
        "peak_bytes": max(now - before for before, now in itertools.pairwise(sent)),
        "numbers": None if diloco is None else diloco.numbers_sent,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": len(losses),
        "seconds": time.perf_counter() - began,
        "curve": losses,
    }


def diloco_of(model: Any, opt: torch.optim.Optimizer, settings: Settings) -> DiLoCo | None:
    """As the method asks for it."""
    asked = METHODS[settings.method]
    if asked is None:
        return None
    sparse, bits = asked
    keywords = dict(every=settings.every, fragments=settings.fragments, overlap=settings.overlap, lr=settings.lr)
    return DiLoCo(model.named_parameters(), opt, **keywords, bits=bits, sparse=sparse)


def own_batches(corpus: Any, config: TrainConfig, rank: int) -> Iterator[torch.Tensor]:
    """Batches of a worker without end, ``int64[batch_size, sequence_length]``."""
    generator = torch.Generator().manual_seed(1000 * config.seed + rank)
    while True:
        yield sample_windows(corpus.train, config.batch_size, config.sequence_length, generator)


def gradient_bytes(model: Any, opt: torch.optim.Optimizer, workers: int) -> int:
    """Bytes that one worker sends in a step of DDP: fp32, compact gradients where weights are projected."""
    numbers = 0
    for parameter in model.parameters():
        state = opt.state[parameter]
        along = len(state["index"]) / parameter.shape[state["dim"]] if "index" in state else 1
        numbers += round(parameter.numel() * along)
    return 4 * numbers * 2 * (workers - 1) // workers


if __name__ == "__main__":
    main()

"""How well cheap scores rank the rows of a weight gradient: `python -m benchmarks.ranking`.

The demo's model trains with dense AdamW. Every so often each linear weight's exact gradient `G = dY^T X` is taken from one step,
and the rows (columns) that each kind of scores would choose are compared with those of largest norm:

- overlap: the share of the top r by exact scores that are among the top r by these;
- caught: the norm of the gradient on the chosen rows, relative to that on the top r by exact scores.

`previous` scores exactly, by the gradient of the step before: what any proposal that serves from the next step on is up against.
`shared` adds up the estimates (sampled: the samples) of the weights that read the same activations. `uniform` draws blindly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.record import RESULTS, ROOT, circumstances, table
from grass_compile.ops import scores

sys.path.insert(0, str(ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from corpus import load_corpus
from training import TrainConfig, batches, build_model, lr_share

SHARED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
KINDS = ("sampled", "estimate", "sampled, shared", "previous", "uniform")


class Probe:
    """Sees `X` and `dY` of every linear layer of the blocks in one step."""

    def __init__(self, model: Any) -> None:
        self.layers = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in self.layers.items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: self.seen.update({name: (grad.detach().flatten(0, -2), x)}))

        return hook

    def energies(self, name: str, axis: str, hyper: Tensor) -> dict[str, Tensor]:
        """By kind of scores, those of each row (column) of one weight, squared."""
        grad_out, x = self.seen[name]
        own, other = (grad_out, x) if axis == "rows" else (x, grad_out)
        every, due = scores.STRIDE, scores.DUE[True]
        return {
            "exact": scores.product_energy(own, other, 1, 1),
            "sampled": scores.product_energy(own, other, every, every),
            "estimate": scores.sketched_energy(own, other, hyper, due) if axis == "rows" else scores.energy(own, due),
            "uniform": torch.rand(own.shape[1]),
        }


def compare(exact: Tensor, other: Tensor, rank: int) -> tuple[float, float]:
    """Overlap and caught, of the rows that `other` ranks highest."""
    best, chosen = exact.topk(rank).indices, other.topk(rank).indices
    overlap = torch.isin(chosen, best).float().mean()
    return float(overlap), float((exact[chosen].sum() / exact[best].sum()).sqrt())


def collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each probed step, axis, rank, weight and kind of scores."""
    config = TrainConfig(lr=arguments.lr, steps=arguments.steps)
    model, corpus = build_model(config), load_corpus(None)
    probe = Probe(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, config))
    records: list[dict[str, Any]] = []
    previous: dict[tuple[str, str], Tensor] = {}
    every = arguments.every
    for step, ids in enumerate(tqdm(batches(corpus, config), total=config.steps + 1, desc="steps", file=sys.stderr)):
        model(input_ids=ids, labels=ids).loss.backward()
        if step % every == 0 or (step + 1) % every == 0:
            found = {
                (name, axis): probe.energies(name, axis, torch.tensor([float(step), 0.0]))
                for name in probe.layers
                for axis in ("rows", "columns")
            }
            if step % every == 0 and previous:
                records += _records(step, found, previous, [config.hidden_size // share for share in (8, 4)])
            previous = {key: energies["exact"] for key, energies in found.items()}
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == config.steps:
            return records
    raise AssertionError("batches come without end")


def _records(
    step: int, found: dict[tuple[str, str], dict[str, Tensor]], previous: dict[tuple[str, str], Tensor], ranks: list[int]
) -> list[dict[str, Any]]:
    records = []
    for (name, axis), energies in found.items():
        block, layer = name.rsplit(".", 1)
        exact, energies = energies["exact"], {**energies, "previous": previous[name, axis]}
        group = next((names for names in SHARED if layer in names), {layer})
        if axis == "columns" and len(group) > 1:
            energies["sampled, shared"] = sum((found[f"{block}.{one}", axis]["sampled"] for one in group), torch.zeros(()))
        for rank in ranks:
            for kind in (kind for kind in KINDS if kind in energies):
                overlap, caught = compare(exact, energies[kind], rank)
                where = {"step": step, "weight": name, "layer": layer, "axis": axis, "rank": rank, "scores": kind}
                records.append({**where, "overlap": round(overlap, 4), "caught": round(caught, 4)})
    return records


def summarised(records: list[dict[str, Any]], *keys: str) -> list[list[str]]:
    """Means of overlap and caught by some keys."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return [
        [*map(str, key), *(f"{statistics.mean(record[what] for record in found):.2f}" for what in ("overlap", "caught"))]
        for key, found in sorted(groups.items())
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between probes")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=RESULTS / "ranking.json")
    arguments = parser.parse_args()
    records = collect(arguments)
    for keys in (("axis", "rank", "scores"), ("axis", "scores", "layer"), ("axis", "scores", "step")):
        print(table([*keys, "overlap", "caught"], summarised(records, *keys)), "\n")
    what = {"steps": arguments.steps, "every": arguments.every, "lr": arguments.lr}
    arguments.out.write_text(json.dumps({"settings": what, **circumstances(), "records": records}) + "\n")


if __name__ == "__main__":
    main()

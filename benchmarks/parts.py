"""What each part of the method is worth: an eager simulation of it, part by part, and of parts that the package does not have.

    python -m benchmarks.parts            # runs what is not recorded yet, one JSON line a run; prints the table
    python -m benchmarks.parts --report   # the table alone

The demo's LLaMA at d = 128, 500 steps of 8 x 256 bytes, a fifth of them warm-up. The full gradient is formed in every step and
the formulas are applied to it, so that a part costs a few lines here before it costs a pass. The dense rest of the model is
trained by AdamW at one rate in every run. Only the losses mean anything: time and memory are those of dense training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import grass_compile
from benchmarks.record import RESULTS, ROOT, circumstances, table

sys.path.insert(0, str(ROOT / "examples"))  # the demo is a folder of scripts, which import each other by bare names

from corpus import Corpus, even_windows, load_corpus
from training import TrainConfig, batches, build_model, evaluate, lr_share

STEPS, WARMUP, WIDTH, FEED_FORWARD = 500, 0.2, 128, 344
QUERIES = ("q_proj.weight", "k_proj.weight")
DENSE_LR = 1e-3
"""Of everything but the blocks' linear weights."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One run.

    Attributes:
        method: ``dense``, ``galore`` or ``grass``.
        lr: of the blocks' linear weights.
        rank: r.
        share: take ``rank / WIDTH`` of every weight's columns, also of those that have more than `WIDTH`.
        axis: ``columns``, ``rows``, or ``shorter``: columns, but rows of weights that have fewer of these.
        selection: ``top``, ``norm``, ``norm2``, ``uniform``, or ``cycle``: every column once, in random order, then anew.
        on_refresh: ``reset``, ``carry``, ``keep``, or ``store``: columns that rest keep their moments, and have them again later.
        gap: steps between refreshes.
        stagger: into how many parts of an interval the refreshes of the 28 weights are spread.
        corrected: whether the first moment of new columns is corrected for its bias, but for the very first.
        factored: new columns begin with a second moment made of what all columns have in common and their own norm.
        warmup: steps after a refresh over which the update of new columns rises.
        anneal: how far the update falls from one refresh to the next: linearly, from 1 + anneal to 1 - anneal times the rate.
        sketch: of the rank, how many random directions take the place of columns, to move all the others a little.
        betas: decay rates.
        queries: factor on the rate of the query and key projections.
        queries_rank: rank of these, 0 for the others' rank.
        rule: ``adamw`` or ``muon``: the momentum, orthogonalized, at Adam's root mean square; it has no second moment.
        steps: more of them than the others, for what takes less time for each.
        seed: of the model, the batches and the draws.
    """

    method: str
    lr: float
    rank: int = WIDTH // 4
    share: bool = False
    axis: str = "columns"
    selection: str = "norm"
    on_refresh: str = "carry"
    gap: int = 50
    stagger: int = 28
    corrected: bool = True
    factored: bool = False
    warmup: int = 0
    anneal: float = 0.0
    sketch: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    queries: float = 1.0
    queries_rank: int = 0
    rule: str = "adamw"
    steps: int = STEPS
    seed: int = 0

    @property
    def label(self) -> str:
        """How it differs from the run that has nothing but a method and a rate."""
        plain = Part(self.method, self.lr)
        fields = (f.name for f in dataclasses.fields(self) if f.name not in ("method", "lr", "seed"))
        return ", ".join([self.method, *(f"{f}={getattr(self, f)}" for f in fields if getattr(self, f) != getattr(plain, f))])


class Moments:
    """Adam in some space; each row of it counts its own steps."""

    def __init__(self, like: Tensor, betas: tuple[float, float]) -> None:
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)
        self.steps, self.known = torch.zeros(len(like), 1), torch.zeros(len(like), 1)
        self.betas = betas

    def update(self, gradient: Tensor, corrected: bool = True) -> Tensor:
        """``m_hat / (sqrt(v_hat) + eps)``; ``known`` counts what the second moment stands for."""
        beta1, beta2 = self.betas
        self.steps, self.known = self.steps + 1, self.known + 1
        self.m.lerp_(gradient, 1 - beta1)
        self.v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        m = self.m / (1 - beta1**self.steps) if corrected else self.m
        return m / ((self.v / (1 - beta2**self.known)).sqrt() + 1e-8)

    def rows(self, index: Tensor) -> Moments:
        """A copy of some rows."""
        found = type(self)(self.m[index], self.betas)
        found.m, found.v, found.steps, found.known = self.m[index], self.v[index], self.steps[index], self.known[index]
        return found

    def write(self, index: Tensor, other: Moments) -> None:
        """Put rows where `rows` took them."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine[index] = theirs

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.m, self.v, self.steps, self.known


class Momentum(Moments):
    """Muon's: only the first moment counts."""

    def update(self, gradient: Tensor, corrected: bool = True) -> Tensor:
        """Five Newton-Schulz iterations bring the singular values near 1."""
        self.steps, self.known = self.steps + 1, self.known + 1
        self.m.lerp_(gradient, 1 - MOMENTUM)
        mean = gradient.lerp(self.m, MOMENTUM)
        wide = mean.t() if mean.shape[0] > mean.shape[1] else mean
        wide = wide / (wide.norm() + 1e-7)
        for _ in range(5):
            gram = wide @ wide.t()
            wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.775 * gram) @ wide
        return 0.2 * math.sqrt(max(wide.shape)) * (wide.t() if mean.shape[0] > mean.shape[1] else wide)


MOMENTUM = 0.95
RULES = {"adamw": Moments, "muon": Momentum}


class Weight:
    """One linear weight in training."""

    def __init__(self, part: Part, weight: Tensor, offset: int, generator: torch.Generator) -> None:
        self.part, self.weight, self.offset, self.generator = part, weight, offset, generator
        shorter = part.axis == "shorter" and weight.shape[0] < weight.shape[1]
        self.transposed = part.method == "grass" and not shorter and part.axis != "rows"
        if part.method == "galore":
            self.transposed = weight.shape[0] > weight.shape[1]
        length = weight.shape[1 if self.transposed else 0]
        self.rank = (length * part.rank // WIDTH if part.share else min(part.rank, length)) - part.sketch
        self.since = 0
        self.index = self.order = torch.empty(0, dtype=torch.int64)
        self.moments: Moments | None = None
        self.all: Moments | None = None
        self.sketched: tuple[Tensor, Moments] | None = None

    def step(self, gradient: Tensor, lr: float, step: int) -> None:
        """Move."""
        weight, gradient = (self.weight.t(), gradient.t()) if self.transposed else (self.weight, gradient)
        due = step == 0 or (step + self.offset) % self.part.gap == 0
        if self.part.method == "dense":
            self.moments = self.moments or RULES[self.part.rule](gradient, self.part.betas)
            weight.sub_(self.moments.update(gradient), alpha=lr)
        elif self.part.method == "galore":
            self._galore(weight, gradient, lr, due)
        else:
            self._grass(weight, gradient, lr, due, step)

    def _galore(self, weight: Tensor, gradient: Tensor, lr: float, due: bool) -> None:
        if due:
            self.basis = torch.linalg.svd(gradient, full_matrices=False).U[:, : self.rank]
        compact = self.basis.t() @ gradient
        self.moments = self.moments or Moments(compact, self.part.betas)
        weight.sub_(self.basis @ self.moments.update(compact), alpha=lr)

    def _grass(self, weight: Tensor, gradient: Tensor, lr: float, due: bool, step: int) -> None:
        if due:
            self._refresh(gradient)
            self.since = 0
        assert self.moments is not None
        update = self.moments.update(gradient[self.index], self.part.corrected or step < self.part.gap)
        lr *= 1 + self.part.anneal * (1 - 2 * (self.since + 0.5) / self.part.gap)
        self.since += 1
        if self.part.warmup:
            update = update * (self.moments.steps / self.part.warmup).clamp(max=1)
        weight.index_add_(0, self.index, update, alpha=-lr)
        if self.sketched is not None:
            signs, moments = self.sketched
            weight.sub_(signs @ moments.update(signs.t() @ gradient), alpha=lr)

    def _refresh(self, gradient: Tensor) -> None:
        part, norms, old = self.part, gradient.norm(dim=1), self.index
        index = self._choose(norms)
        new = RULES[part.rule](gradient[index], part.betas)
        before = self.moments
        if before is not None and part.on_refresh == "keep":
            new = before
        elif before is not None and part.on_refresh == "carry":
            slot = torch.full((len(gradient),), -1)
            slot[old] = torch.arange(len(old))
            stays = slot[index] >= 0
            new.write(stays.nonzero().flatten(), before.rows(slot[index][stays]))
        elif part.on_refresh == "store":
            self.all = self.all or Moments(gradient, part.betas)
            if before is not None:
                self.all.write(old, before)
            new = self.all.rows(index)
        if before is not None and part.factored:
            fresh = (new.known == 0).flatten()
            common = (before.v / (1 - part.betas[1] ** before.known)).mean(0)
            own = norms[index][fresh, None].square() / norms[old].square().mean()
            new.v[fresh], new.known[fresh] = common * own * (1 - part.betas[1] ** 10), 10.0
        self.index, self.moments = index, new
        if part.sketch:
            signs = torch.randint(0, 2, (len(gradient), part.sketch), generator=self.generator) * 2.0 - 1
            signs[index] = 0
            self.sketched = signs / math.sqrt(part.sketch), Moments(gradient[: part.sketch], part.betas)

    def _choose(self, norms: Tensor) -> Tensor:
        if self.part.selection == "cycle":
            if len(self.order) < self.rank:
                self.order = torch.cat((self.order, torch.randperm(len(norms), generator=self.generator)))
            taken, self.order = self.order[: self.rank], self.order[self.rank :]
            return taken.unique()
        if self.part.selection == "top":
            return norms.topk(self.rank).indices.sort().values
        gumbel = -(-torch.rand(len(norms), generator=self.generator).clamp(1e-12, 1 - 1e-7).log()).log()
        power = {"uniform": 0, "norm": 1, "norm2": 2}[self.part.selection]
        return (norms.log() * power + gumbel).topk(self.rank).indices.sort().values


def run(part: Part, corpus: Corpus) -> list[float]:
    """Train; the validation loss after each fifth."""
    config = TrainConfig(
        lr=1.0,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        layers=4,
        heads=4,
        steps=part.steps,
        warmup_share=WARMUP,
        seed=part.seed,
    )
    model, windows = build_model(config), even_windows(corpus.held_out, 64, 256)
    rest = grass_compile.param_groups(model, lr=LR)[-1]["params"]
    dense = {name for name, _ in rest}
    projected = [(name, p) for name, p in model.named_parameters() if name not in dense]
    others = torch.optim.AdamW([p for _, p in rest], lr=DENSE_LR, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(part.seed)
    offsets = [i * part.stagger // len(projected) * part.gap // part.stagger for i in range(len(projected))]
    weights = []
    for (name, p), offset in zip(projected, offsets, strict=True):
        rank = part.queries_rank if part.queries_rank and name.endswith(QUERIES) else part.rank
        weights.append(Weight(dataclasses.replace(part, rank=rank), p.data, offset, generator))
    compiled, losses = torch.compile(model), []
    for step, ids in enumerate(tqdm(batches(corpus, config), total=part.steps, desc=part.label, file=sys.stderr, leave=False)):
        if step and step % (part.steps // 5) == 0:
            losses.append(round(evaluate(model, windows), 4))
        if step == part.steps:
            return losses
        share = lr_share(step, config)
        others.param_groups[0]["lr"] = DENSE_LR * share
        compiled(input_ids=ids, labels=ids).loss.backward()
        others.step()
        with torch.no_grad():
            for weight, (name, p) in zip(weights, projected, strict=True):
                assert p.grad is not None
                factor = part.queries if name.endswith(QUERIES) else 1.0
                weight.step(p.grad, part.lr * share * factor, step)
                p.grad = None
        others.zero_grad()
    raise AssertionError("batches come without end")


LR = 3e-3
"""Of grass, the best of those tried."""


def parts() -> Iterator[Part]:
    """Rates; single changes of the best run; the most telling ones with further seeds."""
    base = Part("grass", LR)
    uniform = dataclasses.replace(base, selection="uniform")
    yield from (Part("dense", lr) for lr in (1e-3, 2e-3, 3e-3))
    yield from (Part("galore", lr) for lr in (1e-3, 2e-3, 4e-3))
    yield from (dataclasses.replace(base, lr=lr) for lr in (2e-3, LR))
    yield from (dataclasses.replace(uniform, lr=lr) for lr in (2e-3, LR, 4e-3))
    seeded = [Part("dense", 2e-3), uniform, base, dataclasses.replace(base, selection="top"), Part("galore", 4e-3)]
    yield from (dataclasses.replace(part, seed=seed) for seed in (1, 2) for part in seeded)
    yield from faster_queries(uniform)
    for change in (
        {"stagger": 4}, {"stagger": 1}, {"stagger": 1, "warmup": 10}, {"gap": 25}, {"gap": 100}, {"rank": 48}, {"rank": 64},
        {"warmup": 10}, {"rank": 64, "lr": 2e-3}, {"warmup": 10, "seed": 1}, {"warmup": 10, "seed": 2},
        {"rank": 64, "lr": 2e-3, "seed": 1}, {"rank": 64, "lr": 2e-3, "seed": 2}, {"rank": 48, "seed": 1},
        {"rank": 48, "seed": 2}, {"rank": 48, "lr": 2e-3}, {"steps": 725},
        {"factored": True}, {"corrected": False}, {"betas": (0.9, 0.99)}, {"sketch": 8}, {"on_refresh": "store"},
        {"on_refresh": "reset"}, {"on_refresh": "keep"}, {"axis": "rows"}, {"axis": "rows", "lr": 1.5e-3}, {"share": True},
        {"gap": 200}, {"gap": 10}, {"steps": 650},
    ):  # fmt: skip
        yield dataclasses.replace(uniform, **change)
    for change in (
        {"axis": "rows"}, {"axis": "shorter"}, {"selection": "norm2"}, {"selection": "cycle"}, {"on_refresh": "reset"},
        {"on_refresh": "keep"}, {"on_refresh": "store"}, {"stagger": 1}, {"gap": 10}, {"gap": 25}, {"gap": 100},
    ):  # fmt: skip
        yield dataclasses.replace(base, **change)
    yield dataclasses.replace(base, axis="rows", selection="top", on_refresh="reset", stagger=1)  # the paper's


def faster_queries(uniform: Part) -> Iterator[Part]:
    """Query and key projections at a rate of their own; what that changes; Muon, whose state is half of Adam's."""
    faster = dataclasses.replace(uniform, queries=2.0)
    muon = dataclasses.replace(faster, rule="muon", lr=1.2e-2)
    for seed in (0, 1, 2):
        yield dataclasses.replace(faster, seed=seed)
        yield dataclasses.replace(muon, rank=64, queries=1.0, seed=seed)
    yield from (Part("dense", 2e-3, queries=factor) for factor in (0.5, 2.0))
    yield Part("galore", 4e-3, queries=2.0)
    for seed in (0, 1, 2):
        yield dataclasses.replace(muon, queries=1.0, seed=seed)
        yield dataclasses.replace(faster, rank=48, seed=seed)
        yield dataclasses.replace(faster, rank=64, lr=2e-3, seed=seed)
    yield dataclasses.replace(uniform, queries=3.0)
    yield from (dataclasses.replace(faster, anneal=anneal, seed=seed) for anneal, seed in ((1.0, 0), (-0.5, 0), (-0.5, 1)))
    yield from (dataclasses.replace(uniform, queries_rank=rank) for rank in (64, 128))
    yield from (Part("dense", lr, rule="muon") for lr in (3e-3, 6e-3))
    yield from (dataclasses.replace(faster, **change) for change in (
        {"selection": "norm"}, {"selection": "top"}, {"axis": "rows"}, {"on_refresh": "reset"}, {"stagger": 1}, {"rank": 16},
        {"gap": 25}, {"gap": 100}, {"corrected": False}, {"lr": 2e-3}, {"lr": 4e-3}, {"share": True},
    ))  # fmt: skip
    yield from (dataclasses.replace(muon, lr=2.4e-2, rank=rank) for rank in (32, 64))
    yield muon


def read(record: dict[str, Any]) -> Part:
    """The run of a record."""
    return Part(**{**record["part"], "betas": tuple(record["part"]["betas"])})


def report(records: list[dict[str, Any]]) -> str:
    """Each part at its best rate, by its loss."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        part = read(record)
        found[part.label][part.lr].append(record["losses"][-1])
    best = {}
    for label, rates in found.items():
        seeds = max(map(len, rates.values()))
        best[label] = min((statistics.mean(losses), lr, losses) for lr, losses in rates.items() if len(losses) == seeds)
    dense = best["dense"][0] if "dense" in best else math.nan
    lines = [
        [label, f"{lr:g}", f"{mean:.3f}", f"{mean / dense - 1:+.1%}", " ".join(f"{loss:.3f}" for loss in losses)]
        for label, (mean, lr, losses) in sorted(best.items(), key=lambda item: item[1])
    ]
    return table(["part", "lr", "loss", "to dense", "by seed"], lines)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the runs that are missing only every Nth ...")
    parser.add_argument(
        "--first", type=int, default=0, metavar="I", help="... from the Ith on, so that several processes can share"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "parts.jsonl")
    options = parser.parse_args()
    records = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {read(record) for record in records}
    todo = [] if options.report else [part for part in parts() if part not in done][options.first :: options.every]
    corpus = load_corpus(None) if todo else None
    for part in tqdm(todo, desc="runs", unit="run", file=sys.stderr):
        assert corpus is not None
        record = {"part": dataclasses.asdict(part), "losses": run(part, corpus), **circumstances()}
        records.append(record)
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(report(records))


if __name__ == "__main__":
    main()

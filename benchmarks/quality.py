"""The study: which selection, axis, refresh and rule learn best. One JSON line a run; a run that is recorded is not run again.

    python -m benchmarks.quality                 # all stages, about six hours on two cores
    python -m benchmarks.quality --stages peers  # one of them; those before it must have run
    python -m benchmarks.quality --report        # tables and plots of what is recorded, nothing is run

The screening is done with one seed at the small size, each stage building on the best that the stages before it found:
learning rates first, then every selection, axis and refresh, then single changes of the best of these, then rules and peers at
learning rates of their own. Some of these run three times as long, and the finalists with three seeds, at the small and at the
larger size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.quality_report import write_report
from benchmarks.quality_run import Run
from benchmarks.record import RESULTS, ROOT, circumstances

sys.path.insert(0, str(ROOT / "examples"))

from runner import run_command

Record = dict[str, Any]

DENSE_LRS = (1e-3, 2e-3, 3e-3)
GRASS_LRS = (2e-3, 3e-3, 4e-3)
QUERIES = 2.0
"""Factor on the rate of the query and key projections with grass; `benchmarks.parts` has shown what it is worth."""
BASE = {"selection": "uniform", "axis": "columns", "on_refresh": "carry", "update_proj_gap": 50, "stagger": True}


class Study:
    """What is recorded, and how the stages look it up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.read()

    def read(self) -> None:
        """Catch up with the file, into which other processes may write too."""
        if self.path.exists():
            self.records = [json.loads(line) for line in self.path.read_text().splitlines()]

    def run(self, run: Run) -> None:
        """Run it and append its record, unless there is one."""
        self.read()
        if self.find(run) is not None:
            return
        log = Path("out") / "logs" / f"quality-{zlib.crc32(json.dumps(dataclasses.asdict(run)).encode()):08x}.log"
        command = [sys.executable, "-m", "benchmarks.quality_run", json.dumps(dataclasses.asdict(run))]
        steps = run.training().steps
        try:
            result = run_command(command, steps, run.label, log, {"PYTHONPATH": str(ROOT)})
        except RuntimeError as error:
            tqdm.write(str(error), file=sys.stderr)
            return
        kept = ("val_loss", "bigram_loss", "optimizer_state_bytes", "tokens_per_second", "train_seconds", "compile_seconds")
        record = {**{key: result[key] for key in kept}, "curve": result["curve"], **circumstances()}
        record = {"run": dataclasses.asdict(run), **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.read()

    def find(self, run: Run) -> Record | None:
        """The record of a run."""
        wanted = Run(**json.loads(json.dumps(dataclasses.asdict(run))))
        return next((record for record in self.records if Run(**record["run"]) == wanted), None)

    def best(self, which: Callable[[Run], bool]) -> Run:
        """The run of lowest validation loss among those of the usual length recorded with the first seed.

        Raises:
            LookupError: there is none.
        """

        def first(record: Record) -> bool:
            run = Run(**record["run"])
            return run.seed == 0 and not run.steps and which(run)

        found = [(record["val_loss"], index) for index, record in enumerate(self.records) if first(record)]
        if not found:
            raise LookupError("nothing is recorded that this stage builds on; run the stages before it")
        return Run(**self.records[min(found)[1]]["run"])


def rates(study: Study) -> Iterator[Run]:
    """Learning rates of dense training; then of grass with everything else at dense training's best."""
    for lr in DENSE_LRS:
        yield Run("dense", "small", lr, lr)
    dense = study.best(lambda run: run.method == "dense" and run.size == "small" and run.lr == run.dense_lr)
    for factor in (2, 4):  # as every other method may: a rate of their own for the linear weights
        yield dataclasses.replace(dense, lr=dense.lr * factor)
    for queries in (0.5, QUERIES):
        yield dataclasses.replace(dense, queries=queries)
    for lr in GRASS_LRS:
        yield Run("AdamW", "small", lr, dense.lr, 4, BASE, queries=QUERIES)
    yield dataclasses.replace(best_base(study), queries=1.0)


def grid(study: Study) -> Iterator[Run]:
    """Every selection, axis and refresh, at the best rate found for `BASE`."""
    base = best_base(study)
    for axis in ("columns", "rows"):
        for selection in ("top", "norm", "uniform"):
            for on_refresh in ("carry", "reset", "keep"):
                yield changed(base, selection=selection, axis=axis, on_refresh=on_refresh)


def single(study: Study) -> Iterator[Run]:
    """Single changes of the best of the grid, and ranks; with another seed than the grid, whose best was lucky with its own."""
    base = dataclasses.replace(best_grid(study), seed=1)
    yield base
    yield dataclasses.replace(best_of(study, "dense"), seed=1)
    for stagger in (False, 4):  # 4: what True means for selections by exact scores
        yield changed(base, stagger=stagger)
    yield changed(base, axis="auto")
    for gap in (10, 20, 100, 200):
        yield changed(base, update_proj_gap=gap)
    for scores in ("sampled", "estimate"):
        scored = changed(base, selection="norm", scores=scores)
        for axis in ("rows", "columns"):
            yield changed(scored, axis=axis)
        yield changed(scored, axis="columns", share_index=True)
        yield changed(scored, axis="columns", update_proj_gap=10)
    yield changed(dataclasses.replace(best_base(study), seed=1), share_index=True)
    yield changed(base, betas=[0.9, 0.99])
    yield changed(base, betas=[0.9, 0.95])
    for share in (2, 8, 16):
        for factor in (0.5, 1.0, 2.0):
            yield dataclasses.replace(base, rank_share=share, lr=base.lr * factor)


def projections(study: Study) -> Iterator[Run]:
    """Dense projections in the graph, at rates of their own; GaLore as galore-torch has it."""
    base = best_base(study)
    for name, scale in (("galore", 0.25), ("gaussian", 1.0)):
        for on_refresh in ("keep", "reset"):
            keywords = {"projection": name, "on_refresh": on_refresh, "scale": scale, "update_proj_gap": 50}
            for lr in (1e-3, 2e-3, 4e-3):
                yield dataclasses.replace(base, lr=lr / scale, keywords=keywords)


def muon(study: Study) -> Iterator[Run]:
    """Muon at d/4, and at d/2, where its state has as many bytes as AdamW's at d/4; at rates of its own, for q and k too."""
    for share in (4, 2):
        for queries in (1.0, QUERIES):
            for lr in (3e-3, 6e-3, 1.2e-2, 2.4e-2):
                yield dataclasses.replace(best_base(study), method="Muon", lr=lr, rank_share=share, queries=queries)


def rules(study: Study) -> Iterator[Run]:
    """Each rule, at rates of its own."""
    base = best_grid(study)
    for name, lrs, keywords in (
        ("Adafactor", (1e-2, 3e-2, 1e-1), {}),
        ("Lion", (5e-4, 1e-3, 2e-3), {}),
        ("SGD", (0.1, 0.5, 2.0), {"momentum": 0.9}),
        ("Optimizer", (1.5e-3, 3e-3, 6e-3), {"rule": "sonew"}),
        ("AdamW8bit", (1.5e-3, 3e-3), {}),
        ("Apollo", (1.5e-3, 3e-3, 6e-3), {}),
        ("Sketchy", (1.5e-3, 3e-3, 6e-3), {}),
    ):
        for lr in lrs:
            yield dataclasses.replace(base, method=name, lr=lr, keywords={**base.keywords, **keywords})


def peers(study: Study) -> Iterator[Run]:
    """The packages that people use today, at the same rank and at rates of their own."""
    dense = study.best(lambda run: run.method == "dense" and run.size == "small" and run.lr == run.dense_lr)
    for name, lrs in (
        ("galore", (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
        ("apollo", (1e-3, 2e-3, 4e-3, 8e-3)),
        ("fira", (4e-3, 8e-3, 1.6e-2)),
        ("lora", (5e-4, 1e-3, 4e-3, 1.6e-2)),
    ):
        for lr in lrs:
            yield Run(name, "small", lr, dense.lr, 4)
        if name != "lora":
            yield dataclasses.replace(best_of(study, name, queries=1.0), queries=QUERIES)


def longer(study: Study) -> Iterator[Run]:
    """Three times as many steps, and the demo's 750 at its size: what holds there of what the short runs say."""
    base = best_base(study)
    dense, fira = best_of(study, "dense"), best_of(study, "fira")
    found = [dense, base, *(changed(base, update_proj_gap=gap) for gap in (20, 200)), fira]
    found += [dataclasses.replace(run, lr=run.lr / 2) for run in (dense, base, fira)]
    found += [dataclasses.replace(base, rank_share=2, lr=base.lr / 2)]
    for share in (2, 4):
        found += [dataclasses.replace(base, method="Muon", rank_share=share, lr=lr) for lr in (3e-3, 6e-3, 1.2e-2)]
    for run in found:
        yield dataclasses.replace(run, steps=1500)
    demo = dataclasses.replace(larger(base), steps=750)
    yield dataclasses.replace(demo, lr=2 * demo.lr)
    yield dataclasses.replace(demo, method="Muon", rank_share=2, lr=1.2e-2, queries=1.0)
    yield dataclasses.replace(demo, method="Muon", rank_share=2, lr=6e-3)


def seeds(study: Study) -> Iterator[Run]:
    """The finalists at the small size with two more seeds."""
    for finalist in finalists(study):
        for seed in (1, 2):
            yield dataclasses.replace(finalist, seed=seed)


def finals(study: Study) -> Iterator[Run]:
    """The finalists at the larger size: three seeds at rates that follow from those that were best at the small one, then half
    and twice these."""
    for seed in (0, 1, 2):
        for finalist in finalists(study):
            yield dataclasses.replace(larger(finalist), seed=seed)
    for factor in (0.5, 2.0):
        for finalist in map(larger, finalists(study)):
            yield dataclasses.replace(finalist, lr=finalist.lr * factor)


def larger(run: Run) -> Run:
    """The run at twice the width: at half the rates, as the demo's sweep at that width has it; but for Muon, whose updates are of
    one length whatever the width."""
    factor = 1.0 if run.method == "Muon" else 0.5
    return dataclasses.replace(run, size="large", lr=run.lr * factor, dense_lr=run.dense_lr * 0.5)


def finalists(study: Study) -> list[Run]:
    """Dense training, the peers and ours at their best rates: the grid's best at the peers' rank, at as many bytes as GaLore's
    state has, and at r = d/2; Muon at d/4, and at d/2, which takes AdamW's bytes at d/4; and what the paper has."""
    grass = best_base(study)
    paper = dataclasses.replace(changed(grass, selection="top", on_refresh="reset", axis="rows", stagger=False), queries=1.0)
    more = [dataclasses.replace(grass, rank_share=share, lr=grass.lr * share / 4) for share in (8 / 3, 2)]
    return [
        best_of(study, "dense"),
        grass,
        *(best_of(study, name) for name in ("galore", "apollo", "fira")),
        *more,
        *(best_of(study, "Muon", share) for share in (4, 2)),
        paper,
    ]


STAGES: dict[str, Callable[[Study], Iterable[Run]]] = {
    "rates": rates, "grid": grid, "single": single, "projections": projections, "muon": muon, "rules": rules, "peers": peers,
    "longer": longer, "seeds": seeds, "finals": finals,
}  # fmt: skip


def best_base(study: Study) -> Run:
    """`BASE` at its best rate."""
    return study.best(
        lambda run: (
            run.method == "AdamW" and run.size == "small" and run.keywords == BASE and run.rank_share == 4
            and run.queries == QUERIES
        )
    )  # fmt: skip


def best_grid(study: Study) -> Run:
    """The best of the grid."""
    keys = set(BASE)
    base = best_base(study)
    return study.best(
        lambda run: (
            run.method == "AdamW" and run.size == "small" and set(run.keywords) == keys and run.rank_share == 4
            and (run.lr, run.queries) == (base.lr, QUERIES)
            and all(run.keywords[key] == BASE[key] for key in ("update_proj_gap", "stagger"))
        )
    )  # fmt: skip


def best_of(study: Study, method: str, rank_share: float | None = None, queries: float | None = None) -> Run:
    """A method at its best rate, small."""
    return study.best(
        lambda run: (
            run.method == method and run.size == "small"
            and rank_share in (None, run.rank_share) and queries in (None, run.queries)
        )
    )  # fmt: skip


def changed(run: Run, **keywords: Any) -> Run:
    """The run with other keywords."""
    return dataclasses.replace(run, keywords={**run.keywords, **keywords})


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--report", action="store_true", help="only report")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a stage's runs only every Nth ...")
    parser.add_argument(
        "--first", type=int, default=0, metavar="I", help="... from the Ith on, so that processes can share a stage"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "quality" / "runs.jsonl")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    study = Study(options.out)
    try:
        for stage in [] if options.report else options.stages:
            # Lazily: what a stage runs may depend on what it has found so far.
            for number, run in enumerate(tqdm(STAGES[stage](study), desc=stage, unit="run", position=1)):
                if number % options.every == options.first:
                    study.run(run)
    except LookupError as error:
        sys.exit(f"quality: {error}")
    write_report(study.records, options.out.parent)


if __name__ == "__main__":
    main()

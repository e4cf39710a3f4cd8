"""What the kernels of one LLaMA block move: `python -m benchmarks.gpu_code` counts bytes and operations of every kernel that
Inductor generates for an H200 or an A100, which need not be there, in a regular step.

For each kernel: the bytes that it has to move (every element that it reads or writes, once, in its dtype) and the bytes that it
does move, since a GPU moves whole sectors of 32 bytes: who picks single columns of a row-major matrix gets their neighbours too.
Operations are those of matrix products and of attention. What a cache serves twice is counted once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor.virtualized import V

from benchmarks import record
from benchmarks.record import number
from grass_compile import _aot
from grass_compile._described import describing
from grass_compile.planner.plan import setup_of
from grass_compile.planner.request import Request, factory, loaded
from grass_compile.planner.training import staged, train

SECTOR = 32
"""Bytes that memory moves at least."""

SHEET = {"H200": (4.8e12, 990e12), "A100": (1.555e12, 312e12)}
"""By the data sheets (of an A100 with 40 GB): bytes a second, and operations of dense bf16 products."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        graph: ``forward``, ``backward`` or ``step``.
        name: what it computes.
        least: bytes of what it reads and writes.
        moved: bytes in whole sectors.
        flops: of its product.
        gpu: what it is generated for.
    """

    graph: str
    name: str
    least: float
    moved: float
    flops: float
    gpu: str = "H200"

    @property
    def seconds(self) -> float:
        """The time that it takes at least, by what bounds it."""
        memory, products = SHEET[self.gpu]
        return max(self.moved / memory, self.flops / products)


class Census:
    """Sees every graph after fusion, and notes its kernels."""

    def __init__(self, rank: int, block: int, gpu: str) -> None:
        self.rank, self.block, self.gpu = rank, block, gpu
        self.graphs: list[tuple[str, str, list[Kernel]]] = []
        self._name, self._shape, self._has_steps = "", "", False

    def see_graph(self, name: str, gm: Any) -> None:
        """The next code is this graph's."""
        self._name = name.removeprefix("grass_")
        targets = [str(node.target) for node in gm.graph.nodes]
        if self._name == "backward" and not any("step_" in target for target in targets):
            self._name = "deferred"
        inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        self._shape = f"{'×'.join(map(str, inputs[1].shape))} {inputs[0].dtype}" if self._name == "step" else ""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Inductor's hook behind fusion."""
        self.graphs.append((self._name, self._shape, [kernel for node in nodes for kernel in self._kernels(node)]))
        return nodes

    def _kernels(self, node: Any) -> Iterator[Kernel]:
        inner = node.get_nodes()
        written = {dep.name for part in inner for dep in part.read_writes.writes}
        is_product = type(node).__name__ == "ExternKernelSchedulerNode"
        kernel = str(getattr(node.node, "python_kernel_name", None) or "") if is_product else ""
        if "step_" in kernel or "step_" in str(getattr(node.node, "op_overload", "")):
            return  # a graph of its own
        if is_product and type(node.node).__name__ == "MultiOutput":
            return
        seen: dict[tuple[str, str, bool], tuple[float, float]] = {}
        for part in inner:
            size = math.prod(int(n) for n in _sizes(part))
            for writes, deps in ((False, part.read_writes.reads), (True, part.read_writes.writes)):
                for dep in deps:
                    name = node.scheduler.mutation_real_name.get(dep.name, dep.name)
                    if type(dep).__name__ == "WeakDep" or (not writes and dep.name in written):
                        continue
                    if writes and not _leaves(dep.name, node):
                        continue
                    if type(dep).__name__ == "StarDep" and not is_product:
                        continue  # what is mutated is a write already
                    seen[name, str(_index(dep)), writes] = self._bytes(dep, size, node.scheduler)
        least, moved = (_capped(seen, which, node.scheduler) for which in (0, 1))
        flops = float(node.estimate_flops() or 0) if is_product else 0.0
        yield Kernel(self._name, kernel.removeprefix("extern_kernels.") or _origin(inner), least, moved, flops, self.gpu)

    def _bytes(self, dep: Any, size: int, scheduler: Any) -> tuple[float, float]:
        """Least and in sectors, of one read or write; ``size`` is how often its kernel's body runs."""
        index = _index(dep)
        if index is None:
            return (_whole(dep.name, scheduler),) * 2
        item = V.graph.get_dtype(dep.name).itemsize
        picks = [s for s in index.free_symbols if str(s).startswith(("tmp", "indirect"))]
        if not picks:
            least = float(dep.get_numel()) * item
            return least, max(least, SECTOR)
        if index.coeff(picks[0]) != 1:  # whole rows
            return float(size * item), float(size * item)
        width = max([abs(int(index.coeff(s))) for s in index.free_symbols if s not in picks] or [self.rank])
        return float(size * item), size // self.rank * _sectors(width, self.rank, self.block, item) * SECTOR


def _sectors(width: int, rank: int, block: int, item: int) -> float:
    """In how many sectors lie ``rank`` of ``width`` numbers, drawn in blocks of neighbours; the expectation."""
    block = math.gcd(block, rank, width)
    here, drawn, each = width // block, rank // block, max(1, SECTOR // (item * block))  # blocks: all, drawn, of a sector
    if here <= drawn + each:
        return width * item / SECTOR
    missed = math.exp(sum(math.log1p(-each / (here - i)) for i in range(drawn)))
    return here / each * (1 - missed) * max(1, item * block // SECTOR)


def _index(dep: Any) -> Any:
    """Where an access is; None if anywhere."""
    return dep.index if type(dep).__name__ == "MemoryDep" else None


def _sizes(part: Any) -> Sequence[Any]:
    sizes = getattr(part, "_sizes", None)
    return [n for group in sizes for n in group] if sizes else [1]


def _leaves(name: str, node: Any) -> bool:
    """Whether somebody outside of a kernel reads what it writes."""
    buffer = node.scheduler.name_to_buf.get(name)
    if buffer is None or buffer.get_mutations() or name in V.graph.get_output_names():
        return True
    own = {part.get_name() for part in node.get_nodes()}
    users = [user.node for user in buffer.users if not user.is_weak]
    return not users or any(user.get_name() not in own for user in users if hasattr(user, "get_name"))


def _whole(name: str, scheduler: Any) -> float:
    """All bytes of a buffer; of an operator that returns several, of these."""
    try:
        return float(V.graph.get_numel(name)) * V.graph.get_dtype(name).itemsize
    except NotImplementedError:
        results = [user.node.get_outputs()[0].node.get_name() for user in scheduler.name_to_buf[name].users]
        return sum(_whole(result, scheduler) for result in dict.fromkeys(results))


def _capped(seen: dict[tuple[str, str, bool], tuple[float, float]], which: int, scheduler: Any) -> float:
    """The bytes of all accesses; of each buffer, read in several places, no more than all of it."""
    totals: dict[tuple[str, bool], float] = {}
    for (name, _, writes), found in seen.items():
        totals[name, writes] = totals.get((name, writes), 0.0) + found[which]
    return sum(min(total, max(_whole(name, scheduler), SECTOR)) for (name, _), total in totals.items())


def _origin(parts: Sequence[Any]) -> str:
    names = [str(node.target).split(".")[-2] for part in parts for node in part.node.get_origins() if "." in str(node.target)]
    return " ".join(list(dict.fromkeys(names))[:6])


def counted(axis: str, d: int, ffn: int, tokens: int, rank: int, block: int, optimizer: str, gpu: str = "H200") -> list[Kernel]:
    """The kernels of a regular step of one block, in order."""
    fields = {"hidden_size": d, "intermediate_size": ffn, "num_hidden_layers": 1, "num_attention_heads": d // 128}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128, **fields}))
        request = Request(folder, 1, tokens, optimizer=optimizer, keywords=(("axis", axis), ("block", block), ("rank", rank)))
        model = loaded(request)
    setup = dataclasses.replace(setup_of(request, model), optimizer=factory(request))
    census = Census(rank, block, gpu)
    patched, seen = inductor_config.patch(_post_fusion_custom_pass=census), _aot.graphs_seen_by(census.see_graph)
    with patched, describing(gpu), staged("cuda"), seen:
        shadow = setup.build()
        weights = [tuple(p.shape) for p in shadow.model.layers[0].parameters() if p.dim() == 2]  # type: ignore[union-attr, index]
        shadow.model.layers[0].compile(backend="grass")  # type: ignore[union-attr, index]
        train(shadow, setup, 4)
    last = {(name, shape): kernels for name, shape, kernels in census.graphs}
    found = [*last["forward", ""], *last["backward", ""]]
    for shape in weights:
        found += last["step", f"{'×'.join(map(str, shape))} torch.bfloat16"]
    return found


def report(kernels: Sequence[Kernel]) -> str:
    """Kernels that are alike in one row."""
    rows: dict[tuple[str, str, int, int], list[Kernel]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.graph, kernel.name, round(kernel.least), round(kernel.flops)), []).append(kernel)
    table = [
        [
            graph,
            name,
            str(len(alike)),
            number(sum(k.least for k in alike), ".1f", 1e6),
            number(sum(k.moved for k in alike), ".1f", 1e6),
            number(alike[0].moved / alike[0].least if alike[0].least else None, ".2f"),
            number(sum(k.flops for k in alike), ".1f", 1e9),
            number(sum(k.seconds for k in alike), ".1f", 1e-6),
        ]
        for (graph, name, _, _), alike in rows.items()
    ]
    total = [sum(getattr(k, what) for k in kernels) for what in ("least", "moved", "flops", "seconds")]
    least, moved, flops, seconds = total
    sums = [number(least, ".1f", 1e6), number(moved, ".1f", 1e6), number(moved / least, ".2f")]
    table.append(["all", "", str(len(kernels)), *sums, number(flops, ".1f", 1e9), number(seconds, ".1f", 1e-6)])
    return record.table(["graph", "kernel", "launches", "least MB", "moved MB", "ratio", "GFLOP", "µs at least"], table)


def main() -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_code", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=("columns", "rows"), default=["columns", "rows"])
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--gpu", choices=SHEET, default="H200", help="default H200")
    for name, value in (("d", 4096), ("ffn", 11008), ("tokens", 4096), ("rank", 256), ("block", 1)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {}
    for axis in arguments.axes:
        sizes = (arguments.d, arguments.ffn, arguments.tokens, arguments.rank, arguments.block)
        kernels = counted(axis, *sizes, arguments.optimizer, arguments.gpu)
        print(f"\n{axis}\n{report(kernels)}")
        found[axis] = [dataclasses.asdict(kernel) for kernel in kernels]
    suffix = "" if arguments.gpu == "H200" else f"-{arguments.gpu}"
    out = (
        arguments.out
        or record.RESULTS
        / "gpu_code"
        / f"{arguments.optimizer.lower()}-d{arguments.d}-r{arguments.rank}-block{arguments.block}{suffix}.json"
    )
    record.write(out, "gpu_code", arguments, {"kernels": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

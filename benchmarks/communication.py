"""What data parallel training sends for its gradients, and how long that takes on a link, by a model that is written down here.

    python -m benchmarks.communication              # r = d/8
    python -m benchmarks.communication --rank 0.25

Nothing is run: bytes follow from the shapes. That these are the bytes which are really sent is what `tests/distributed` counts.

A collective over ``N`` ranks is a ring: an all-reduce of ``B`` bytes takes ``2 (N - 1)`` steps in each of which a rank sends
``B / N`` bytes, so ``2 (N - 1) (latency + B / (N bandwidth))``; a reduce-scatter or an all-gather takes half of it. Nothing
overlaps with computing. Gradients and weights travel block by block: so do FSDP2's groups, and compact gradients where blocks are
compiled one by one; DDP's buckets are a little smaller. One link joins all ranks, as the slowest one does.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

BF16 = 2


@dataclass(frozen=True)
class Model:
    """A LLaMA by its shapes, which are those of the models' papers."""

    width: int
    layers: int
    ffn: int
    vocabulary: int
    key_value: int  # features of the key and value projections

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Out- and in-features of the linear weights of one block."""
        d, f, kv = self.width, self.ffn, self.key_value
        return [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def rest(self) -> int:
        """Numbers that stay dense: embedding, head and norms."""
        return 2 * self.vocabulary * self.width + (2 * self.layers + 1) * self.width


@dataclass(frozen=True)
class Link:
    """Seconds before the first byte arrives, and bytes a second from then on."""

    latency: float
    bandwidth: float


MODELS = {
    "LLaMA 7B": Model(4096, 32, 11008, 32000, 4096),
    "LLaMA 13B": Model(5120, 40, 13824, 32000, 5120),
    "Llama 3.1 70B": Model(8192, 80, 28672, 128256, 1024),
    "Llama 3.1 405B": Model(16384, 126, 53248, 128256, 1024),
}
LINKS = {
    "NVLink, 450 GB/s": Link(5e-6, 450e9),
    "PCIe 4, 25 GB/s": Link(10e-6, 25e9),
    "Ethernet, 100 Gb/s": Link(30e-6, 12.5e9),
    "internet, 1 Gb/s": Link(20e-3, 0.125e9),
}
WORLDS = (8, 64, 1024)


def ring(numbers: float, world: int, link: Link, collectives: int, passes: int) -> float:
    """Seconds for some collectives that send so many bf16 numbers in all; ``passes`` is 2 for an all-reduce, else 1."""
    share = numbers * BF16 / collectives / world
    return collectives * passes * (world - 1) * (link.latency + share / link.bandwidth)


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank hands to collectives in a regular step, and seconds that these take.

    Attributes:
        parallel: ``DDP``, or ``FSDP2``, where weights are gathered twice as well.
        dense_bytes: with full gradients.
        compact_bytes: with those of columns.
        dense_seconds: likewise.
        compact_seconds: likewise.
    """

    model: str
    link: str
    world: int
    parallel: str
    dense_bytes: float
    compact_bytes: float
    dense_seconds: float
    compact_seconds: float


def sent(name: str, link: str, world: int, parallel: str, rank: float) -> Sent:
    """One line of the table.

    Args:
        name: of the model.
        link: its name.
        world: how many ranks.
        parallel: ``DDP`` or ``FSDP2``.
        rank: as a share of the width.
    """
    model = MODELS[name]
    columns = round(rank * model.width)
    full = model.layers * sum(m * n for m, n in model.linear)
    compact = model.layers * sum(m * min(columns, n) for m, n in model.linear)
    groups = model.layers + 1
    passes = 2 if parallel == "DDP" else 1

    def seconds(numbers: float, collectives: int, passes: int) -> float:
        return ring(numbers, world, LINKS[link], collectives, passes)

    gathered = 0.0 if parallel == "DDP" else 2 * (full + model.rest)
    weights = seconds(gathered, 2 * groups, 1) if gathered else 0.0
    dense_seconds = weights + seconds(full + model.rest, groups, passes)
    compact_seconds = weights + seconds(compact + model.rest, groups, passes)
    amounts = [(numbers + model.rest + gathered) * BF16 for numbers in (full, compact)]
    return Sent(name, link, world, parallel, *amounts, dense_seconds, compact_seconds)


def table(lines: list[Sent]) -> str:
    """The lines as a Markdown table."""
    rows = [
        "| model | link | ranks | | GB a step, dense | compact | | seconds, dense | compact | |",
        "| --- | --- | --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for line in lines:
        bytes_, seconds = line.compact_bytes / line.dense_bytes, line.dense_seconds / line.compact_seconds
        rows.append(
            f"| {line.model} | {line.link} | {line.world} | {line.parallel} | {line.dense_bytes / 1e9:.1f} | "
            f"{line.compact_bytes / 1e9:.1f} | {bytes_:.2f} | {line.dense_seconds:.3g} | {line.compact_seconds:.3g} | "
            f"{seconds:.1f} × |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rank", type=float, default=0.125, help="columns, as a share of the width")
    parser.add_argument("--out", type=Path, help="a JSON file to write too")
    options = parser.parse_args()
    lines = [
        sent(name, link, world, parallel, options.rank)
        for name in MODELS
        for parallel in ("DDP", "FSDP2")
        for world in WORLDS
        for link in LINKS
    ]
    print(table(lines))
    if options.out is not None:
        options.out.write_text(json.dumps({"rank": options.rank, "lines": [asdict(line) for line in lines]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Byte tokens from a folder of text, by default the sources of the Python that runs this.

Whole files are held out for validation, and which ones depends on their names alone, so that every run, method and
machine with the same files trains and validates on the same bytes.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
HELD_OUT_SHARE = 0.05
SMALLEST = 20_000  # bytes; a twentieth of it holds a few windows to validate on
SKIPPED_IN_STDLIB = frozenset(
    {
        # differ from one Python build to the next, as the library proper does not
        *("site-packages", "dist-packages", "test", "tests", "idle_test"),
        # a fifth of the library's bytes, and generated: tables of characters, and its manual in one string
        *("encodings", "pydoc_data"),
    }
)


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, `uint8[n]` each, and where it came from."""

    train: Tensor
    held_out: Tensor
    source: str
    train_files: int
    held_out_files: int

    def __str__(self) -> str:
        return (
            f"{self.source}: {len(self.train) / 1e6:.1f} MB in {self.train_files} files to train on, "
            f"{len(self.held_out) / 1e6:.2f} MB in {self.held_out_files} held-out files"
        )


def load_corpus(folder: str | Path | None = None, max_bytes: int = 10_000_000) -> Corpus:
    """The text under `folder` (None: the `.py` files of the standard library), at most `max_bytes` of it.

    Files are taken in the order of a hash of their relative path: the same everywhere, and a size cap cuts no
    alphabetical tail off. The first of them are held out, about a twentieth of the bytes and at least one file; of a
    single file the tail is held out.

    Raises:
        ValueError: the folder has no text in it, or too little.
    """
    if folder is None:
        texts = _read_texts(Path(sysconfig.get_path("stdlib")), "*.py", SKIPPED_IN_STDLIB, max_bytes)
    else:
        texts = _read_texts(Path(folder), "*", frozenset(), max_bytes)
    size = sum(map(len, texts))
    if size < SMALLEST:
        raise ValueError(f"{folder} has {size:,} bytes of text in it, too few to train on; {SMALLEST:,} would do")
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - HELD_OUT_SHARE))
        texts = [texts[0][cut:], texts[0][:cut]]
    held_out: list[bytes] = []
    quota = HELD_OUT_SHARE * size
    while len(texts) > 1 and sum(map(len, held_out)) < quota:
        held_out.append(texts.pop(0))
    source = "the Python standard library" if folder is None else str(folder)
    return Corpus(_as_tensor(texts), _as_tensor(held_out), source, len(texts), len(held_out))


def sample_windows(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`int64[count, length]`: windows of `data` that start at random places."""
    starts = torch.randint(len(data) - length + 1, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(length)].long()


def even_windows(data: Tensor, count: int, length: int) -> Tensor:
    """`int64[count, length]`: windows spread evenly over `data`; fewer where it is too short for `count` of them."""
    count = max(1, min(count, len(data) // length))
    starts = torch.linspace(0, len(data) - length, count).long()
    return data[starts[:, None] + torch.arange(length)].long()


def bigram_loss(train: Tensor, windows: Tensor) -> float:
    """Nats per byte that a byte-bigram model reaches on `windows` (`int64[n, length]`).

    Counts over `train` with add-one smoothing. A model whose loss is not well below this has learned no more than which
    byte follows which.
    """
    pairs = train[:-1].long() * VOCABULARY + train[1:].long()
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY) + 1
    log_probabilities = counts.double().log() - counts.sum(1, keepdim=True).double().log()
    return -log_probabilities[windows[:, :-1], windows[:, 1:]].mean().item()


def _read_texts(root: Path, pattern: str, skipped: frozenset[str], max_bytes: int) -> list[bytes]:
    """The text files under `root` in the order of their paths' hashes, until `max_bytes` are read."""
    relative = [path.relative_to(root) for path in root.rglob(pattern) if path.is_file()]
    relative = [path for path in relative if not _is_skipped(path, skipped)]
    relative.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    texts: list[bytes] = []
    room = max_bytes
    for path in relative:
        text = (root / path).read_bytes()[:room]
        if text and b"\0" not in text:  # a NUL byte tells a binary file from text in any common encoding
            texts.append(text)
            room -= len(text)
        if room == 0:
            break
    return texts


def _is_skipped(path: Path, skipped: frozenset[str]) -> bool:
    return any(part in skipped or part.startswith((".", "__pycache__")) for part in path.parts)


def _as_tensor(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)

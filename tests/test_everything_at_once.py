"""A small LLaMA on text with every option at once, killed twice and resumed.

`train` is the script. Each run of it has a process to itself, forked from a server that has imported and not computed anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import random
import signal
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grass_compile

from . import paper

STEPS, EPOCH, SAVE_EVERY, GAP = 75, 15, 10, 25
MICRO_BATCHES, SIZE, LAST_SIZE, LENGTH = 2, 8, 3, 32
WARM_UP = 2 * EPOCH  # steps after a start in which every shape has been seen twice
SHARE_OF_UNIGRAM = 0.9
IMPORTS = ["tests.test_everything_at_once", "torch._inductor.compile_fx", "transformers.models.llama.modeling_llama"]

# ------------------------------------------------------------------------------------------------------------ the script


def text() -> Tensor:
    """Half a megabyte of the Python standard library, ``uint8[n]``."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(source.read_bytes() for source in sources)[:500_000]), dtype=torch.uint8)


def micro_batch(data: Tensor, step: int, number: int) -> Tensor:
    """``int64[size, length]``, a function of its place alone; the last one of each epoch is smaller."""
    is_last = step % EPOCH == EPOCH - 1 and number == MICRO_BATCHES - 1
    generator = torch.Generator().manual_seed(step * MICRO_BATCHES + number)
    starts = torch.randint(len(data) - LENGTH, (LAST_SIZE if is_last else SIZE,), generator=generator)
    return data[starts[:, None] + torch.arange(LENGTH)].long()


def llama() -> nn.Module:
    """One layer of width 64 on bytes, recomputed in the backward."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=LENGTH, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model.train()


class Compilations(logging.Handler):
    """Counts what Dynamo and this package compile."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.variants = 0
        log = logging.getLogger("grass_compile")
        log.addHandler(self)
        log.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.variants += record.getMessage().startswith("compiling")

    def count(self) -> dict[str, int]:
        return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"], "variants": self.variants}


def train(folder: Path) -> None:
    """Train to the end, from the checkpoint on if there is one; write down the loss of every step."""
    torch.set_num_threads(1)
    compilations = Compilations()
    data, model = text(), llama()
    optimizer = paper.AdamW(
        model.named_parameters(), lr=6e-3, weight_decay=0.1, rank=16, update_proj_gap=GAP, axis="auto", on_refresh="carry",
        max_grad_norm=1.0, stochastic_rounding=True, seed=0,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})

    with (folder / "losses").open("a", buffering=1) as losses:
        losses.write("\n")  # ends a line that a kill has cut off
        for step in range(start, STEPS):
            if step % SAVE_EVERY == 0 and step > start:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"step": step, **states}, folder / "checkpoint.new")
                (folder / "checkpoint.new").replace(checkpoint)
            loss = sum(
                micro_step(compiled, optimizer, micro_batch(data, step, number), number) for number in range(MICRO_BATCHES)
            )
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            assert sum("index" in state for state in optimizer.state.values()) == 7  # all of its layer
            losses.write(json.dumps({"step": step, "loss": loss.hex(), "start": start, **compilations.count()}) + "\n")


def micro_step(compiled: nn.Module, optimizer: grass_compile.AdamW, ids: Tensor, number: int) -> float:
    """One forward and backward; its share of the loss."""
    with contextlib.nullcontext() if number == MICRO_BATCHES - 1 else optimizer.accumulate():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss / MICRO_BATCHES
        loss.backward()
    return loss.item()


# -------------------------------------------------------------------------------------------------------------- the test


def launch(folder: Path) -> Any:
    """The script in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    process = context.Process(target=train, args=(folder,), daemon=True)
    process.start()
    return process


def notes(folder: Path) -> list[dict[str, Any]]:
    """What was noted so far, in the order of writing; a line that a kill has cut off is no note."""
    path = folder / "losses"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def finish(folder: Path) -> list[dict[str, Any]]:
    process = launch(folder)
    process.join(timeout=600)
    assert process.exitcode == 0
    return notes(folder)


def kill_after(folder: Path, step: int, delay: float) -> None:
    """Run the script until it has done ``step``, and a moment longer."""
    process = launch(folder)
    while not any(note["step"] >= step for note in notes(folder)[-1:]):
        assert process.is_alive()
        time.sleep(0.02)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def unigram_loss(data: Tensor) -> float:
    """Nats per byte of a model that knows how frequent each byte is, and nothing else."""
    share = torch.bincount(data.long(), minlength=256).double() / len(data)
    return float(-(share * share.clamp(min=1e-12).log()).sum())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_twice_it_trains_as_if_nothing_had_happened(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = finish(whole)
    losses = {note["step"]: note["loss"] for note in expected}
    assert list(losses) == list(range(STEPS))

    chance = random.Random(0)
    for earliest in (2 * SAVE_EVERY, STEPS // 2):
        kill_after(killed, earliest + chance.randrange(STEPS // 3), chance.random() / 10)
    found = finish(killed)
    starts = sorted({note["start"] for note in found})
    assert len(starts) == 3 and all(start % SAVE_EVERY == 0 for start in starts)
    assert {note["step"] for note in found} == set(range(STEPS))
    assert [note for note in found if note["loss"] != losses[note["step"]]] == []  # what was done twice came out the same twice

    final = sum(float.fromhex(losses[step]) for step in range(STEPS - EPOCH, STEPS)) / EPOCH
    assert final < SHARE_OF_UNIGRAM * unigram_loss(text())
    check_compilations(expected)
    for start in starts:
        check_compilations([note for note in found if note["start"] == start])


def check_compilations(run: list[dict[str, Any]]) -> None:
    """One graph of fixed batch size and one of any; nothing is compiled once every kind of step has been seen."""
    later = [note for note in run if note["step"] >= run[0]["start"] + WARM_UP]
    assert run[-1]["graphs"] <= 2
    assert len({(note["graphs"], note["variants"]) for note in later}) <= 1

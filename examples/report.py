"""Writes what the demo measured: `report.md` to read, `metrics.json` to compute with, `loss.png` to look at."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

from training import Event, TrainConfig

matplotlib.use("Agg")  # before pyplot, and for machines without a screen
import matplotlib.pyplot as plt

COLORS = ("#444444", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind too
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One run of the demo, with what `train()` returned for it."""

    label: str
    config: TrainConfig
    tried: int  # how many runs of a recorded sweep its learning rates are the best of; 0: they are fallback rates
    result: Event


def write_report(runs: list[Run], environment: Event, folder: Path) -> None:
    """Write all three files into `folder`. The first run is the one that the others are compared with."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_losses(runs, folder / "loss.png")
    (folder / "metrics.json").write_text(json.dumps(metrics(runs, environment), indent=2) + "\n")
    (folder / "report.md").write_text(markdown(runs, environment))


def metrics(runs: list[Run], environment: Event) -> Event:
    dense = runs[0].result
    return {
        "environment": environment,
        "corpus": dense["corpus"],
        "bigram_loss": dense["bigram_loss"],
        "runs": [
            {
                "label": run.label,
                "config": asdict(run.config),
                "rates_tried": run.tried,
                "val_loss_over_dense": run.result["val_loss"] / dense["val_loss"],
                "tokens_per_second_over_dense": run.result["tokens_per_second"] / dense["tokens_per_second"],
                **run.result,
            }
            for run in runs
        ],
    }


def markdown(runs: list[Run], environment: Event) -> str:
    config, first = runs[0].config, runs[0].result
    lines = [
        "# Demo: a small LLaMA on bytes, dense and with grass",
        "",
        f"- Model: Hugging Face `LlamaForCausalLM`, d = {config.hidden_size}, {config.layers} layers, feed-forward "
        f"{config.intermediate_size}, {first['parameters'] / 1e6:.2f} M parameters, float32.",
        f"- Text: {first['corpus']}.",
        f"- Training: {config.steps} steps of {config.batch_size} × {config.sequence_length} bytes, the same batches, "
        f"initial weights and schedule for all; seed {config.seed}.",
        f"- Learning rates: {rates(runs)}.",
        f"- A byte-bigram model reaches {first['bigram_loss']:.3f} nats per byte on the same held-out bytes.",
        f"- Machine: {', '.join(f'{name} {value}' for name, value in environment.items())}.",
        "",
        *table(runs),
        "",
        "Validation loss is in nats per byte, on held-out files. Seconds and tokens per second leave compiling and "
        "validating out; compiling started from an empty cache. Peak memory is that of the training steps: resident "
        "memory of the whole process (Python, torch and the compiler's remains included) on a CPU, allocated memory on "
        "a GPU.",
        "",
        "![validation loss against steps and against seconds](loss.png)",
    ]
    for run in runs:
        if run.result["projection"] is not None:
            lines += ["", f"## What was projected: {run.label}", "", "```", run.result["projection"], "```", ""]
            lines += [f"Projected weights moved {run.result['weights_move']}."]
    return "\n".join(lines) + "\n"


def rates(runs: list[Run]) -> str:
    """Where each run's learning rates come from: a method with fewer tried may have a better one."""
    counts = [f"{run.tried} for {run.label}" for run in runs if run.tried]
    text = f"the best of those tried in a recorded sweep: {'; '.join(counts)}" if counts else "fallback rates"
    return text if len(counts) in (0, len(runs)) else f"{text}. Runs marked with * had none there, and took fallback rates"


def table(runs: list[Run]) -> list[str]:
    """The runs side by side, as the lines of a Markdown table."""
    first = f"over {runs[0].label}"
    names = ("method", "learning rate", "val. loss", first, "tokens/s", first)
    names += ("peak memory", "optimizer state", "compile", "training")
    rows = [names, ("---", *["--:"] * (len(names) - 1)), *(cells(run, runs[0].result) for run in runs)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def cells(run: Run, dense: Event) -> tuple[str, ...]:
    result = run.result
    return (
        run.label,
        f"{run.config.lr:g}{'' if run.tried else ' *'}",
        f"{result['val_loss']:.4f}",
        f"{100 * (result['val_loss'] / dense['val_loss'] - 1):+.1f} %",
        f"{result['tokens_per_second']:,.0f}",
        f"× {result['tokens_per_second'] / dense['tokens_per_second']:.2f}",
        f"{result['peak_memory_bytes'] / MIB:,.0f} MiB",
        f"{result['optimizer_state_bytes'] / MIB:.1f} MiB",
        f"{result['compile_seconds']:.0f} s",
        f"{result['train_seconds']:.0f} s",
    )


def plot_losses(runs: list[Run], path: Path) -> None:
    """Validation loss against steps and against seconds, side by side, with the bigram model's as a line."""
    bigram = runs[0].result["bigram_loss"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, axis, unit in zip(panels, ("step", "seconds"), ("training step", "seconds of training"), strict=True):
        panel.axhline(bigram, color="#888888", linestyle=(0, (4, 3)), linewidth=1.2, label="byte-bigram model")
        for run, color in zip(runs, itertools.cycle(COLORS), strict=False):
            points = run.result["curve"]
            style = dict(color=color, label=run.label, linewidth=1.8, linestyle="--" if run.config.rank is None else "-")
            panel.plot([p[axis] for p in points], [p["val_loss"] for p in points], **style)
            panel.plot(points[-1][axis], points[-1]["val_loss"], "o", color=color, markersize=4)
        panel.set_xlabel(unit)
        panel.set_xlim(left=0)
        panel.grid(color="#e6e6e6", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    lowest = min(point["val_loss"] for run in runs for point in run.result["curve"])
    # The first validations, far above the bigram model's loss, would squeeze all that differs into a corner.
    panels[0].set_ylim(min(bigram, lowest) - 0.1, max(bigram, lowest) + 0.8)
    panels[0].set_ylabel("validation loss, nats per byte")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)

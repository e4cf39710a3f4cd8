"""Tables and plots of the study: `report.md`, and loss over tokens, over seconds and over bytes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.quality_run import Run

Record = dict[str, Any]
TOKENS_PER_STEP = 8 * 256
PLOTTED = 8


def write_report(records: list[Record], folder: Path) -> None:
    """Write `report.md` and the plots of what is recorded into `folder`."""
    lines = ["# The study, as far as it is recorded", ""]
    for size, steps in sorted({(r["run"]["size"], r["run"]["steps"]) for r in records}, reverse=True):
        chosen = best_by_setting([r for r in records if (r["run"]["size"], r["run"]["steps"]) == (size, steps)])
        name = f"{size}-{steps}" if steps else size
        lines += [f"## {name}", "", *_table(chosen), "", *(f"![{axis}]({name}-{axis}.png)" for axis in AXES), ""]
        for axis in AXES:
            _plot(chosen, axis, folder / f"{name}-{axis}.png")
    (folder / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))


def best_by_setting(records: list[Record]) -> list[list[Record]]:
    """The records of each setting at the learning rates that ended lowest with its first seed, all its seeds; best first."""
    settings: dict[str, dict[tuple[float, float], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        settings[_setting(record)][record["run"]["lr"], record["run"]["dense_lr"]].append(record)
    chosen = []
    for by_rate in settings.values():
        seed = min(record["run"]["seed"] for found in by_rate.values() for record in found)
        first = [(r["val_loss"], rates) for rates, found in by_rate.items() for r in found if r["run"]["seed"] == seed]
        chosen.append(by_rate[min(first)[1]])
    return sorted(chosen, key=_loss)


def _setting(record: Record) -> str:
    run = Run(**{**record["run"], "lr": 0.0, "seed": 0})
    return run.label.removesuffix(" lr 0")


def _loss(found: list[Record]) -> float:
    return statistics.mean(record["val_loss"] for record in found)


def _table(chosen: list[list[Record]]) -> list[str]:
    plain = next((found for found in chosen if _setting(found[0]) == "dense"), [])
    dense = {record["run"]["seed"]: record["val_loss"] for record in plain}
    lines = ["| setting | lr | validation loss | to dense | seeds | state, MiB | seconds |", "|---|--:|--:|--:|--:|--:|--:|"]
    for found in chosen:
        losses = [record["val_loss"] for record in found]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        same = [dense[record["run"]["seed"]] for record in found if record["run"]["seed"] in dense]
        share = f"{100 * (_loss(found) / statistics.mean(same) - 1):+.1f} %" if len(same) == len(found) else ""
        lines.append(
            f"| {_setting(found[0])} | {found[0]['run']['lr']:g} | {_loss(found):.4f}{spread} | {share} "
            f"| {' '.join(str(seed) for seed in sorted(record['run']['seed'] for record in found))} "
            f"| {found[0]['optimizer_state_bytes'] / 2**20:.2f} | {found[0]['train_seconds']:.0f} |"
        )
    return lines


AXES = ("tokens", "seconds", "bytes")


def _plot(chosen: list[list[Record]], axis: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    if axis == "bytes":
        for method in sorted({found[0]["run"]["method"] for found in chosen}):
            points = [found for found in chosen if found[0]["run"]["method"] == method]
            axes.plot([f[0]["optimizer_state_bytes"] / 2**20 for f in points], [_loss(f) for f in points], "o", label=method)
        axes.set_xlabel("optimizer state, MiB")
    else:
        shown = chosen[:PLOTTED] + [found for found in chosen[PLOTTED:] if found[0]["run"]["method"] != "AdamW"]
        seen: set[str] = set()
        for found in shown:
            method = found[0]["run"]["method"]
            if method != "AdamW" and method in seen:
                continue
            seen.add(method)
            curve = found[0]["curve"][2:]
            along = [p["step"] * TOKENS_PER_STEP if axis == "tokens" else p["seconds"] for p in curve]
            axes.plot(along, [p["val_loss"] for p in curve], label=_setting(found[0])[:60], linewidth=1)
        axes.set_xlabel("tokens (bytes)" if axis == "tokens" else "seconds of training")
    axes.set_ylabel("validation loss, nats per byte")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

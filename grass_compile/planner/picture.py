"""Plans as a picture: a bar of bytes for each method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError
from .result import Plan


def draw(plans: Mapping[str, Plan], path: Path, limit: int | None = None) -> None:
    """Draw stacked bars, and the limit as a line.

    Args:
        plans: by method.
        path: the file to write; its ending says in which format.
        limit: bytes that there are.

    Raises:
        ConfigError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(1.6 + 1.1 * len(plans), 4.5), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(plans)
    names = [plan.method if name == "grass" else name for name, plan in plans.items()]
    for kind in next(iter(plans.values())).bytes:
        sizes = [plan.bytes.get(kind, 0) / 1e9 for plan in plans.values()]
        if any(sizes):
            axes.bar(range(len(names)), sizes, bottom=below, label=kind)
            below = [low + size for low, size in zip(below, sizes, strict=True)]
    if limit is not None:
        axes.axhline(limit / 1e9, color="black", linestyle="--", label="memory")
    axes.set_ylabel("GB at the peak")
    axes.set_title(next(iter(plans.values())).model)
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot write {path}: {error}") from error

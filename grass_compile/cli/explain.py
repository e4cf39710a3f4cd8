"""``grass-compile explain``: which weights of a model are projected, how, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ConfigError
from ..planner.close_up import CloseUp, close_up
from ..planner.examine import examine
from ..planner.models import NAMES
from ..planner.request import DTYPES, OPTIMIZERS
from ..planner.sizes import in_words
from ..report import Report, Row
from .arguments import request_of

DESCRIPTION = """Say for each parameter whether it is projected, along which axis, and why. The model is traced on tensors without
memory; nothing is trained."""

COLUMNS = (
    ("parameter", False),
    ("shape", True),
    ("axis", False),
    ("rank", True),
    ("gradient", True),
    ("state", True),
    ("flops", True),
    ("reason", False),
)
"""Of the page's table: their names, and whether they are sorted as numbers."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("explain", help="which weights are projected, and why", description=DESCRIPTION)
    parser.add_argument("model", help=f"{', '.join(NAMES)}, a Hugging Face config.json or its folder, or module:function")
    parser.add_argument("--rank", required=True, help="rows or columns of each weight: 128, or a fraction, 0.25")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a batch (default 1)")
    parser.add_argument("--seq", type=int, default=512, help="tokens in a sequence (default 512)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW", help="default AdamW")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the optimizer: --set axis=rows")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--weight", metavar="NAME", help="show its graph before and after, and the code of its step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what code is generated for (default cpu)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that can be sorted and filtered")
    parser.set_defaults(run=run, compile="whole", checkpointing=False)


def run(arguments: argparse.Namespace) -> int:
    """Explain."""
    request = request_of(arguments)
    weight = None if arguments.weight is None else close_up(request, arguments.weight)
    report = examine(request) if weight is None or arguments.html is not None else None
    if arguments.html is None:
        print(report if weight is None else "\n".join(f"== {title}\n{text}\n" for title, text in _parts(weight)))
        return 0
    assert report is not None
    settings = (
        f"grass_compile {__version__}, {arguments.optimizer}, rank {arguments.rank}, {arguments.batch} × {arguments.seq} tokens"
    )
    try:
        arguments.html.write_text(page(report, str(arguments.model), settings, weight), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {arguments.html}: {error}") from error
    print(f"{len(report.projected)} of {len(report)} parameters projected; see {arguments.html}")
    return 0


def page(report: Report, title: str, subtitle: str, weight: CloseUp | None = None) -> str:
    """A report as a page that needs nothing beside it.

    Args:
        report: what `grass_compile.explain` returns.
        title: of the page.
        subtitle: a line below it.
        weight: one that is shown with its graph and its code.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("grass_compile", "cli"), autoescape=True, undefined=StrictUndefined)
    flops, gradients, state = report.weight_grad_flops, report.gradient_bytes, report.state_bytes
    totals = [
        ("flops of weight gradients", *(f"{size / 1e9:,.1f} G" for size in (flops.dense, flops.compact)), f"{flops.ratio:.3f}"),
        *(
            (name, in_words(total.dense), in_words(total.compact), f"{total.ratio:.3f}")
            for name, total in (("gradients", gradients), ("optimizer state", state))
        ),
    ]
    rows = [{"projected": row.projected, "cells": _cells(row)} for row in report]
    return environment.get_template("explain.html.jinja").render(
        title=f"{title}: {len(report.projected)} of {len(report)} parameters projected",
        subtitle=subtitle,
        totals=totals,
        columns=COLUMNS,
        rows=rows,
        parts=_parts(weight) if weight is not None else (),
    )


def _parts(weight: CloseUp) -> tuple[tuple[str, str], ...]:
    return (
        (f"{weight.name}: its gradient as torch computes it", weight.before),
        ("as it is computed here, and what takes it", weight.after),
        ("the node that moves the weight", weight.step or "none: opt.step() moves it, by the same kernels"),
        ("the kernels that Inductor makes of its step", weight.code),
    )


def _cells(row: Row) -> list[tuple[str, float | None]]:
    """Texts, and the numbers by which they are sorted."""
    gradient = row.compact_elements * row.dtype.itemsize
    state = 2 * row.dense_elements * row.dtype.itemsize if row.state_bytes is None else row.state_bytes
    return [
        (row.name, None),
        (" × ".join(map(str, row.shape)), row.dense_elements),
        (row.axis or "dense", None),
        (str(row.rank or ""), row.rank or 0),
        (in_words(gradient), gradient),
        (in_words(state), state),
        (f"{row.weight_grad_flops / 1e9:,.2f} G", row.weight_grad_flops),
        (row.reason, None),
    ]

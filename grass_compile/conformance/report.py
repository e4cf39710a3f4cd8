"""The table: for people, in Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import pathlib
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata

import torch

import grass_compile
from grass_compile.conformance.judge import Cell, Outcome
from grass_compile.conformance.sequences.registry import SEQUENCES

BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"
PACKAGES = (
    "torch", "bitsandbytes", "torchao", "galore-torch", "apollo-torch", "fira", "lomo-optim", "badam", "transformers",
)  # fmt: skip
QUOTED = {Outcome.REFUSED, Outcome.REFUSED_LATE, Outcome.TOLD, Outcome.BROKEN, Outcome.NOT_APPLICABLE}
SHORT = {
    Outcome.RIGHT: "right", Outcome.ROUNDED: "to rounding", Outcome.REFUSED_LATE: "late", Outcome.TOLD: "told",
    Outcome.NOT_APPLICABLE: "–",
}  # fmt: skip
LEGEND = """\
*right*: the weights are those of the oracle. *to rounding*: they should be so bit for bit, and are up to rounding. *refused*: a
clear exception before any weight moved. *late*: a clear exception, when weights had moved already. *told*: other weights, and a
warning of the optimizer's that says so. *broken*: an exception that says nothing to whoever wrote the loop. **wrong**: no word,
and other weights (or another norm read), with the largest relative difference. –: not applicable. Numbers in brackets are the
notes below a table."""


def environment() -> dict[str, str]:
    """Versions, machine and day."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found |= {"torch": str(torch.__version__), "grass_compile": grass_compile.__version__}
    found["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return found


def as_json(cells: Iterable[Cell], seed: int) -> str:
    """Every cell with its note and numbers."""
    rows = [dataclasses.asdict(cell) | {"outcome": cell.outcome.value} for cell in cells]
    for row in rows:
        if row["difference"] is not None and math.isinf(row["difference"]):
            row["difference"] = "inf"  # which JSON has no number for
    return json.dumps({"environment": environment(), "seed": seed, "cells": rows}, indent=1)


def as_markdown(cells: Sequence[Cell]) -> str:
    """The legend, and a table for each family of optimizers, with its notes."""
    parts = [LEGEND]
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        families.setdefault(family_of(cell.subject), []).append(cell)
    parts += [f"### {family}\n\n{family_table(members)}" for family, members in families.items()]
    parts.append("### The sequences\n\n" + "\n".join(f"- **{one.name}**: {one.right}" for one in SEQUENCES.values()))
    return "\n\n".join(parts)


def family_of(subject: str) -> str:
    """Which table an optimizer is in."""
    own = (family for family in ("torch.optim", "grass_compile") if subject.startswith(family))
    return next(own, "Other packages")


def family_table(cells: list[Cell]) -> str:
    """Sequences down, optimizers across; what would be a row or a column of nothing but *right* is one line above the table."""
    columns: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        columns.setdefault(cell.subject, {})[cell.sequence] = cell
    missing = {
        name: one.note for name, column in columns.items() for one in column.values() if one.outcome is Outcome.UNAVAILABLE
    }
    fine = [name for name, column in columns.items() if all(map(is_fine, column.values()))]
    lines, notes = [f"{name}: {note}." for name, note in missing.items()], Notes()
    if fine:
        lines.append(f"Right in every applicable sequence: {', '.join(map(short, fine))}.")

    columns = {name: column for name, column in columns.items() if name not in missing and name not in fine}
    if columns:
        sequences = dict.fromkeys(cell.sequence for cell in cells)
        common = [name for name in sequences if all(is_fine(column[name]) for column in columns.values())]
        if common:
            lines.append(f"Right for each optimizer of the table, where applicable: {', '.join(common)}.")
        rows = [[name, *(notes.text(column[name]) for column in columns.values())] for name in sequences if name not in common]
        lines.append(grid([["", *map(short, columns)], *rows]))
    return "\n\n".join(lines + notes.lines())


def is_fine(cell: Cell) -> bool:
    """Right, or no matter."""
    return cell.outcome in (Outcome.RIGHT, Outcome.NOT_APPLICABLE)


def short(subject: str) -> str:
    """The name without what the table's title says."""
    return subject.removeprefix(family_of(subject)).lstrip("., ")


class Notes:
    """Numbers the quotes of a table; equal ones share a number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def text(self, cell: Cell) -> str:
        """What stands in a cell."""
        if cell.outcome is Outcome.WRONG:
            return f"**wrong {cell.difference:.2g}**"
        text = SHORT.get(cell.outcome) or str(cell.outcome.value)
        if cell.outcome in QUOTED:
            text += f" [{self.numbers.setdefault(cell.note, len(self.numbers) + 1)}]"
        return text

    def lines(self) -> list[str]:
        """The notes, as one block."""
        escaped = (note.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_") for note in self.numbers)
        return ["\n".join(f"{number}. {note}" for number, note in enumerate(escaped, start=1))] if self.numbers else []


def grid(rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up, so that it is read as it stands."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def write_markdown(path: pathlib.Path, cells: Sequence[Cell], command: str) -> None:
    """Put the tables between the two markers of a file, whose other text stays; without a file, make one."""
    versions = environment()
    date = versions.pop("date")
    head = f"`{command}`, {date}: {', '.join(f'{name} {version}' for name, version in versions.items())}."
    tables = f"{BEGIN}\n{head}\n\n{as_markdown(cells)}\n{END}"
    text = path.read_text() if path.exists() else f"# Conformance\n\n{BEGIN}{END}\n"
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}, between which the tables go")
    path.write_text(text[: text.index(BEGIN)] + tables + text[text.index(END) + len(END) :])

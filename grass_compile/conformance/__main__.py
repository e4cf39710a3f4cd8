"""``python -m grass_compile.conformance``: run the loops on optimizers and print what came of them."""

from __future__ import annotations

import argparse
import fnmatch
import pathlib
import sys

from grass_compile.conformance import report
from grass_compile.conformance.judge import Cell, Outcome, judge
from grass_compile.conformance.sequences import SEQUENCES
from grass_compile.conformance.subjects import SUBJECTS, select


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m grass_compile.conformance", description=__doc__.partition(": ")[2])
    parser.add_argument("optimizers", nargs="*", metavar="OPTIMIZER", help="a name, its beginning or a pattern; or module:Class")
    parser.add_argument("--sequence", action="append", metavar="NAME", help="only those that match; may be repeated")
    parser.add_argument("--json", action="store_true", help="every cell with its note and numbers, on standard output")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="put the tables between the markers of this file")
    parser.add_argument("--seed", type=int, default=0, help="of the model and its batches (default: 0)")
    parser.add_argument("--list", action="store_true", help="name optimizers and sequences, and run nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is silently wrong or broken")
    return parser


def run(optimizers: list[str], sequences: list[str] | None, seed: int) -> list[Cell]:
    """Judge every chosen sequence on every chosen optimizer; a line of progress for each optimizer."""
    chosen = [one for one in SEQUENCES.values() if any(fnmatch.fnmatch(one.name, pattern) for pattern in sequences or ["*"])]
    if not chosen:
        raise ValueError(f"no sequence is called {' or '.join(sequences or [])!r}; there are: {', '.join(SEQUENCES)}")
    cells = []
    for subject in select(optimizers):
        own = [judge(subject, sequence, seed) for sequence in chosen]
        fine, seconds = sum(report.is_fine(cell) for cell in own), sum(cell.seconds for cell in own)
        unavailable = own[0].note if own[0].outcome is Outcome.UNAVAILABLE else f"{fine} of {len(own)} right or not applicable"
        print(f"{subject.name}: {unavailable}, {seconds:.0f} s", file=sys.stderr, flush=True)
        cells += own
    return cells


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = arguments()
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(["optimizers:", *(f"  {name}" for name in SUBJECTS), "", "sequences:"]))
        print("\n".join(f"  {one.name:24} {one.right}" for one in SEQUENCES.values()))
        return 0
    try:
        cells = run(options.optimizers, options.sequence, options.seed)
        if options.markdown:
            command = " ".join(["python -m grass_compile.conformance", *options.optimizers, "--markdown", str(options.markdown)])
            report.write_markdown(options.markdown, cells, command)
    except ValueError as error:
        parser.error(str(error))
    if options.json:
        print(report.as_json(cells, options.seed))
    elif not options.markdown:
        print(report.as_markdown(cells))
    return int(options.check and any(cell.outcome in (Outcome.WRONG, Outcome.BROKEN) for cell in cells))


if __name__ == "__main__":
    sys.exit(main())

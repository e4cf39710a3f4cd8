"""``grass-compile``, and ``python -m grass_compile``: what fits (``plan``), what is projected (``explain``), what is installed
(``doctor``)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from ..errors import GrassError
from . import doctor, explain, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: those of the command line; None: the process's own.

    Returns:
        0; 1 if a plan does not fit or doctor found what will not work; 2 for input that makes no sense; 141, as a shell has it,
        if nobody reads on.
    """
    parser = argparse.ArgumentParser(prog="grass-compile", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (plan, explain, doctor):
        module.add(commands)
    parsed = parser.parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has read enough (head); nor is Python to say so when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except GrassError as error:
        if parsed.debug:
            traceback.print_exc()
        print(f"grass-compile {parsed.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # whatever a model, torch or Inductor raises: 1 would say that it does not fit
        if parsed.debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        print(f"grass-compile {parsed.command}: {what} (grass-compile --debug {parsed.command} shows where)", file=sys.stderr)
        return 2

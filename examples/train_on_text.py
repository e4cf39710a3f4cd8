"""The demo, pointed at any folder of text: notes, books, source code.

    python examples/train_on_text.py ~/notes
    python examples/train_on_text.py ~/notes --steps 300 --rank 32 --axis columns

Takes the demo's options; the learning rates are those found for the Python standard library.
"""

from __future__ import annotations

import sys

import demo


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    demo.run_program(["--text", *sys.argv[1:]])


if __name__ == "__main__":
    main()

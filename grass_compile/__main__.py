"""``python -m grass_compile``."""

import sys

from .cli import main

sys.exit(main())

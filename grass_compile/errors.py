"""Every error that this package raises, and the warning that it gives.

Each message says what went wrong, where (the parameter's name) and what to do about it.
"""

from __future__ import annotations


class GrassError(Exception):
    """Base of every error raised by ``grass_compile``."""


class ConfigError(GrassError, ValueError):
    """An argument, an option or a combination of them cannot work."""


class GraphError(GrassError):
    """A graph could not be rewritten although it had to be (``strict``), or a rewritten graph broke a rule of ours."""


class StateError(GrassError):
    """The training loop and the compact state contradict each other; nothing was changed."""


class NonFiniteError(StateError, FloatingPointError):
    """Gradients were infinite or NaN, and ``nonfinite="raise"``; their steps were skipped, and training may go on.

    A class of its own, so that a script that goes on after it hides no other error.
    """


class GrassWarning(UserWarning):
    """Training goes on, though probably not as the user expects."""

"""Update rules: an optimizer's arithmetic in the compact space, a few lines of PyTorch that are traced into the graph."""

from .adam import AdamRule
from .adamw import AdamWRule
from .base import Rule
from .sgd import SGDRule

__all__ = ["AdamRule", "AdamWRule", "Rule", "SGDRule"]

"""Update rules in the compact space: plain PyTorch functions that are traced into the backward graph."""

from .adamw import AdamWRule as AdamWRule
from .base import Rule as Rule

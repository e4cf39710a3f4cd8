"""Update rules: an optimizer's arithmetic in the compact space, a few lines of PyTorch that are traced and compiled."""

from ...math.rule import RESERVED, Rule, StateLayout, register_rule, registered_rules
from .adafactor import AdafactorRule
from .adam import AdamRule
from .adamw import AdamWRule
from .adamw8bit import AdamW8bitRule
from .contrib import ApolloRule, SketchyRule
from .lion import LionRule
from .muon import MuonRule
from .sgd import SGDRule
from .sonew import SONewRule

__all__ = [
    "RESERVED", "AdafactorRule", "AdamRule", "AdamW8bitRule", "AdamWRule", "ApolloRule", "LionRule", "MuonRule", "Rule",
    "SGDRule", "SONewRule", "SketchyRule", "StateLayout", "register_rule", "registered_rules",
]  # fmt: skip

register_rule("adamw", AdamWRule())
register_rule("adamw8bit", AdamW8bitRule())
register_rule("adam", AdamRule())
register_rule("sgd", SGDRule())
register_rule("lion", LionRule())
register_rule("adafactor", AdafactorRule())
register_rule("sonew", SONewRule())
register_rule("apollo", ApolloRule())
register_rule("sketchy", SketchyRule())
register_rule("muon", MuonRule())

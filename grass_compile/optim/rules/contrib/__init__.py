"""Rules that work and are tested, and that lost by far at the rates that the study tried (docs/study.md, "Other rules")."""

from .apollo import ApolloRule as ApolloRule
from .sketchy import SketchyRule as SketchyRule

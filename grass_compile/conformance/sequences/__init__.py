"""The training loops, a function each; importing this registers them."""

from grass_compile.conformance.sequences import gradients as gradients
from grass_compile.conformance.sequences import groups as groups
from grass_compile.conformance.sequences import persistence as persistence
from grass_compile.conformance.sequences import several as several
from grass_compile.conformance.sequences import steps as steps
from grass_compile.conformance.sequences.registry import SEQUENCES as SEQUENCES

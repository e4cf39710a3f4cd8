"""The optimizers under test, a function each; importing this registers them, and imports no package of theirs."""
# ruff: noqa: I001 - the order is that of the table

from grass_compile.conformance.subjects import torch_optim as torch_optim
from grass_compile.conformance.subjects import low_bit as low_bit
from grass_compile.conformance.subjects import low_rank as low_rank
from grass_compile.conformance.subjects import fused as fused
from grass_compile.conformance.subjects import grass as grass
from grass_compile.conformance.subjects.registry import SUBJECTS as SUBJECTS
from grass_compile.conformance.subjects.registry import select as select

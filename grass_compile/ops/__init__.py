"""The operators that PyTorch lacks, a file each: schema, fake, CPU code and how Inductor lowers it.

Importing the package registers them.
"""

from . import scores as scores
from .anchor import anchor as anchor
from .contiguous import contiguous as contiguous
from .gather import gather as gather
from .library import laid_out_for as laid_out_for
from .library import on_cpu as on_cpu
from .norm import norm as norm
from .once import once as once
from .rank_update import rank_update as rank_update
from .rank_update import rank_update_ as rank_update_
from .refresh import refresh_ as refresh_
from .refresh import run_refresh as run_refresh
from .row_update import row_update as row_update
from .row_update import row_update_ as row_update_
from .step import kernels as kernels
from .step import run_step as run_step
from .step import step_ as step_

IN_PLACE = {row_update: row_update_, rank_update: rank_update_}
"""The twins that write."""

"""What fits, before it runs: a training step is compiled and its generated code runs on tensors without memory.

::

    models -> training (simulate, ledger) -> plan -> result
"""

from .models import NAMES as NAMES
from .plan import plan as plan
from .result import Plan as Plan

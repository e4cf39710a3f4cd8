"""What fits, before it runs: a training step is compiled and its generated code runs on tensors without memory.

::

    models -> request -> training (with ledger) -> plan -> spread -> result
                                                    |
                                                questions
"""

from .models import NAMES as NAMES
from .plan import plan as plan
from .result import Plan as Plan

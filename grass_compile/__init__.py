"""Structured sparse gradients (Grass) as a graph rewrite: ``torch.compile(model, backend="grass")``."""

from .errors import ConfigError as ConfigError
from .errors import GraphError as GraphError
from .errors import GrassError as GrassError
from .errors import GrassWarning as GrassWarning
from .errors import NonFiniteError as NonFiniteError
from .errors import StateError as StateError
from .explain import explain as explain
from .param_groups import param_groups as param_groups
from .report import Report as Report
from .runtime.optimizers import SGD as SGD
from .runtime.optimizers import Adafactor as Adafactor
from .runtime.optimizers import AdamW as AdamW
from .runtime.optimizers import AdamW8bit as AdamW8bit
from .runtime.optimizers import Apollo as Apollo
from .runtime.optimizers import Lion as Lion
from .runtime.optimizers import Muon as Muon
from .runtime.optimizers import Optimizer as Optimizer
from .runtime.optimizers import Sketchy as Sketchy
from .runtime.rules import Rule as Rule
from .runtime.rules import register_rule as register_rule
from .train_step import train_step as train_step

__version__ = "0.1.0"

"""Structured sparse gradients (Grass) as a graph rewrite: ``torch.compile(model, backend="grass")``."""

from ._version import __version__ as __version__
from .errors import ConfigError as ConfigError
from .errors import GraphError as GraphError
from .errors import GrassError as GrassError
from .errors import GrassWarning as GrassWarning
from .errors import NonFiniteError as NonFiniteError
from .errors import StateError as StateError
from .explain import explain as explain
from .math.rule import Rule as Rule
from .math.rule import register_rule as register_rule
from .optim.optimizer import Optimizer as Optimizer
from .optim.optimizers import SGD as SGD
from .optim.optimizers import Adafactor as Adafactor
from .optim.optimizers import AdamW as AdamW
from .optim.optimizers import AdamW8bit as AdamW8bit
from .optim.optimizers import Apollo as Apollo
from .optim.optimizers import Lion as Lion
from .optim.optimizers import Muon as Muon
from .optim.optimizers import Sketchy as Sketchy
from .optim.param_groups import param_groups as param_groups
from .planner import Plan as Plan
from .planner import plan as plan
from .report import Report as Report
from .train_step import train_step as train_step

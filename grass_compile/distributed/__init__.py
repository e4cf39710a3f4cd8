"""Several processes: how a weight is spread over them (`layout`), a file for each way to spread one, and `DiLoCo`."""

from .diloco import DiLoCo as DiLoCo

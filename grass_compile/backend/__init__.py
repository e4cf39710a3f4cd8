"""The backend: one Dynamo graph in, one callable out. The only wiring between the passes and the runtime."""

from .region import grass as grass

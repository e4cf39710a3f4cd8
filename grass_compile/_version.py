"""The version of the package; in a file that every part may import."""

__version__ = "0.1.0"

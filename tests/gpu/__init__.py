"""Tests of the code generated for a GPU."""

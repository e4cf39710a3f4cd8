"""Tests of grass_compile.passes."""

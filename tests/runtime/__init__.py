"""Tests of grass_compile.runtime."""

"""Tests of grass_compile."""

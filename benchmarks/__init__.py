"""Measurements of grass_compile against dense training and its peers; README.md says how to run and read each."""

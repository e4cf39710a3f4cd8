"""Passes over finished halves of a partitioned graph."""

"""Passes over the joint graph."""

"""Servers that Edgeward is measured beside, each run by the interpreter of its own environment."""

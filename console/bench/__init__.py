"""Measuring models on this box: how fast (`edgeward bench`), and how alike (`edgeward compare`).

Every model file is loaded and run in a child process, so that its memory is its own and a
crash costs only its row. The modules that the child imports (`child`, `load`, `sample`) reach
NumPy and `platforms` only; what the command itself imports at start-up reaches neither.
"""

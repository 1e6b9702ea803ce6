"""Measuring a model file in a process of its own: latency, memory, answers.

The child has a file and a runtime and nothing else, so what it says is theirs; a runtime that
kills its process kills nobody else's.
"""

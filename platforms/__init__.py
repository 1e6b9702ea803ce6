"""What this box is, and how a model file runs on it.

Owns the vocabulary of hardware and artifacts, the probes, detection, preflight
checks, artifact selection and one adapter per inference runtime. Imports
nothing else of Edgeward, and no inference runtime at import time.
"""

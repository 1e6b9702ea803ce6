"""Inference runtimes: one adapter each, behind one interface.

Owns loading a model file and running it. Importing this package imports no
runtime's library: each adapter does so when it is used.
"""

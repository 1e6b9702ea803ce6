"""Staging: whether a version is right on this box, and which of its artifacts is best here.

Everything of a candidate happens in a throw-away process with a time and a memory limit.
"""

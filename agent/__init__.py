"""The truth about jobs and models on one box.

Owns the job state machine, the wire schema of commands, the manifest and the
model repository, the store and the configuration. Imports no ML library.
"""

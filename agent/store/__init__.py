"""The local SQLite store: the only truth about jobs on this box.

One process writes it (the agent); others may open it read-only.
"""

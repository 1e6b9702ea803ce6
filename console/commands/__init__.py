"""The commands of `edgeward`, a module per group: options in, words out.

Each module only reads options, calls what does the work, and words the answer. Its
imports at the top are light; the heavy ones stand inside the commands.
"""

"""From one model format to another: what is given, which tools lead where, and how one runs.

`source` recognises a model, `registry` declares the tools, `plan` chains them, `hop` runs one
in a process of its own; `tools` holds the tools themselves, imported by that process only.
"""

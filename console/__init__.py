"""What a person touches: the `edgeward` command and what it starts on one box.

The only package that imports all the others; nothing imports it.
"""

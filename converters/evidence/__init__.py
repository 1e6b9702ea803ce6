"""What a converted model is worth, shown by running it: parity, speed, size, and a report.

Nothing leaves the converters on the word of a tool: a file that loads, runs and is garbage is
found here.
"""

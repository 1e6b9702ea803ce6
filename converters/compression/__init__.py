"""Smaller and faster forms of a model: quantization, fp16, pruning, distillation.

Owns the recipes (`recipes` declares them, the other modules hold their tools), the data they are
calibrated with and the search for what to leave in full precision. Every tool is a
`converters.task.Tool`: it runs in a process of its own and imports its library inside. None of
them says that its result is good: that is measured by `converters.evidence`.
"""

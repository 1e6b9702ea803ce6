"""Triton's model configuration: read, checked, completed from the graph, told to clients.

`text` reads `config.pbtxt`; `support` refuses by name what is not offered here; `completion`
fills in what the file leaves out and compares it with the graph; `document` is the JSON of
`/v2/models/M/config`; `serving` is what the scheduler goes by; `source` finds the file.

Invariant: a model without a `config.pbtxt` needs no protobuf to run.
"""

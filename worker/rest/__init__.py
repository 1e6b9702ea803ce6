"""The Open Inference Protocol (V2) over HTTP, in front of `worker.engine.service.Service`.

`codec` turns bytes into requests and answers into bytes, `application` is the ASGI application,
`server` binds it to ports and sockets. Nothing here runs a model.
"""

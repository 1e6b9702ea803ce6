"""The agent process: the only writer of the store.

Threads: `writer` (every transaction), `mqtt` (paho's own and the session's),
`dispatch` (tasks to Celery), `outcomes` (what workers say), `inbox` (folders)
and the main thread (heartbeat, watchdog). They meet in the writer's mailbox.
Imported by nobody but `console`.
"""

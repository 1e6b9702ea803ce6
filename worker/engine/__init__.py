"""The inference engine: one copy of each model, many threads, one result per request."""

"""The agent with a bug planted on purpose: the history checker must find it."""

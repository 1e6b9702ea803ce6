"""The tools: each a `convert(task) -> Facts`, imported by the child process only."""

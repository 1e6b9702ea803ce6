"""Python files as a person gives them to be converted: `FILE.py:build`, with a MANIFEST beside."""

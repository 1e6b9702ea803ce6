"""The models that `edgeward demo` starts with."""

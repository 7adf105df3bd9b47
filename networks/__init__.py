"""Architectures by name, and their weights on disk: teacher and student are the same kind of thing."""

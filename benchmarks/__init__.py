"""Runs of the whole system that end in numbers; one question a file. ``python -m benchmarks.demo`` is the main job."""

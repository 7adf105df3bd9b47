"""Runs of the whole system that end in numbers, one question a file; ``benchmarks.demo`` is the main job."""

"""A real PostgreSQL for tests: the same that the benchmarks start."""

from benchmarks.postgres import Postgres, programs, running

__all__ = ["Postgres", "programs", "running"]

"""Every way a run can stop early, with its exit code: one line for a person (expected, got, what to do)."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class Failure(Exception):
    """A run that cannot go on. ``str()`` is the line that is shown; ``exit_code`` is part of the interface."""

    exit_code = 1


class BadInput(Failure):
    """Flags, configuration, pictures or a request that the teacher will never accept."""

    exit_code = 2


class BudgetSpent(Failure):
    """The account has nothing left before the run's budget was used; the same command goes on after a grant."""

    exit_code = 3


class TeacherAway(Failure):
    """No answer for longer than the run was told to wait; the same command goes on later."""

    exit_code = 4


class BadCredential(Failure):
    """The teacher does not take this key."""

    exit_code = 5


class RunFolderProblem(Failure):
    """The run folder is in use, belongs to another configuration or disagrees with the teacher's books."""

    exit_code = 6


class FolderInUse(RunFolderProblem):
    """Another process has the run folder now."""


class DiskProblem(Failure):
    """The disk refuses to keep what must be kept."""

    exit_code = 7


@contextmanager
def disk_problems(what: str) -> Iterator[None]:
    """An OSError while writing, as one line."""
    try:
        yield
    except OSError as error:
        raise DiskProblem(
            f"cannot write {what}: {error.strerror or error}; {_remedies(error)} and start the same command again"
        ) from error


def _remedies(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user write access"
    return "mend that"

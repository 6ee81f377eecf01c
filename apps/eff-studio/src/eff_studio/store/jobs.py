"""Jobs in a SQLite file: what waits, what runs, what is done."""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eff_studio.work import Work, described, kind_of, read_work

log = logging.getLogger("eff_studio")
State = Literal["waiting", "running", "done", "failed", "cancelled"]
_TABLE = """
create table if not exists jobs (
  id text primary key, kind text not null, settings text not null, state text not null, created real not null,
  started real, ended real, error text, pictures text not null default '[]', facts text not null default '{}'
) strict;
create index if not exists jobs_state on jobs (state, created);
"""
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work and its fate.

    Attributes:
        id: Of the job.
        work: What to do.
        state: Where it stands.
        created, started, ended: Seconds since 1970, or None.
        error: Why it failed.
        pictures: Ids of its pictures.
        facts: Further results.
    """

    id: str
    work: Work
    state: State
    created: float
    started: float | None = None
    ended: float | None = None
    error: str | None = None
    pictures: tuple[str, ...] = ()
    facts: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """Kind and settings, as they are written into pictures."""
        return described(self.work)


class Jobs:
    """The table of jobs. All methods may be called from any thread.

    Args:
        path: The file.

    Raises:
        ValueError: the file is of a newer version, or no database.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            version = self._db.execute("pragma user_version").fetchone()[0]
            if version > _VERSION:
                raise ValueError(f"{path} is of version {version}; this eff-studio reads up to {_VERSION}")
            self._db.execute("pragma journal_mode=wal")
            self._db.executescript(_TABLE)
            self._db.execute(f"pragma user_version={_VERSION}")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"{path} is not a database of eff-studio: {error}") from None
        except ValueError:
            self._db.close()
            raise
        # What a killed process was doing is done from the start.
        self._db.execute("update jobs set state='waiting', started=null where state='running'")

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    def add(self, work: Work) -> Job:
        """Put work at the end of the line."""
        job = Job(id=secrets.token_hex(8), work=work, state="waiting", created=time.time(), facts={})
        with self._change() as db:
            db.execute(
                "insert into jobs (id, kind, settings, state, created) values (?, ?, ?, ?, ?)",
                (job.id, kind_of(work), json.dumps(work.to_dict()), job.state, job.created),
            )
        return job

    def start_next(self) -> Job | None:
        """Take the job that waits longest, if one does; it is running now."""
        while True:
            with self._change() as db:
                row = db.execute("select id from jobs where state='waiting' order by created, rowid limit 1").fetchone()
                if row is None:
                    return None
                db.execute("update jobs set state='running', started=? where id=?", (time.time(), row[0]))
            if (job := self.get(row[0])) is not None:
                return job
            self.end(row[0], "failed", error="its settings cannot be read")

    def end(self, job: str, state: State, *, error: str | None = None, pictures: tuple[str, ...] = (),
            facts: dict[str, Any] | None = None) -> None:  # fmt: skip
        """Write down how a job ended."""
        with self._change() as db:
            db.execute(
                "update jobs set state=?, ended=?, error=?, pictures=?, facts=? where id=?",
                (state, time.time(), error, json.dumps(pictures), json.dumps(facts or {}), job),
            )

    def put_back(self, job: str) -> None:
        """A running job waits again, such as when the server closes."""
        with self._change() as db:
            db.execute("update jobs set state='waiting', started=null where id=? and state='running'", (job,))

    def cancel_waiting(self, job: str) -> bool:
        """Cancel a job that waits; False if it does not."""
        with self._change() as db:
            found = db.execute(
                "update jobs set state='cancelled', ended=? where id=? and state='waiting'", (time.time(), job)
            )
            return found.rowcount == 1

    def remove(self, job: str) -> Job | None:
        """Forget a job that has ended; returns it, or None if there is none of this id that has."""
        found = self.get(job)
        if found is None or found.state in ("waiting", "running"):
            return None
        with self._change() as db:
            db.execute("delete from jobs where id=?", (job,))
        return found

    def get(self, job: str) -> Job | None:
        """A job by id."""
        rows = self._read("select * from jobs where id=?", (job,))
        return rows[0] if rows else None

    def latest(self, count: int, *, before: float | None = None) -> list[Job]:
        """The newest jobs, newest first."""
        if before is None:
            return self._read("select * from jobs order by created desc, rowid desc limit ?", (count,))
        return self._read(
            "select * from jobs where created < ? order by created desc, rowid desc limit ?", (before, count)
        )

    def waiting(self) -> int:
        """How many jobs wait."""
        with self._lock:
            return int(self._db.execute("select count(*) from jobs where state='waiting'").fetchone()[0])

    def ahead_of(self, job: Job) -> int:
        """How many waiting jobs come before one."""
        with self._lock:
            found = self._db.execute(
                "select count(*) from jobs where state='waiting' and created < ?", (job.created,)
            ).fetchone()
        return int(found[0])

    def _read(self, query: str, values: tuple[Any, ...]) -> list[Job]:
        with self._lock:
            cursor = self._db.execute(query, values)
            names = [c[0] for c in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        return [job for row in rows if (job := _job(row)) is not None]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _job(row: dict[str, Any]) -> Job | None:
    """A row as a job; None if this version cannot read it, which must not hide all others."""
    try:
        work = read_work(row["kind"], json.loads(row["settings"]))
    except (ValueError, TypeError) as error:
        log.warning("job %s cannot be read: %s", row["id"], error)
        return None
    return Job(
        id=row["id"],
        work=work,
        state=row["state"],
        created=row["created"],
        started=row["started"],
        ended=row["ended"],
        error=row["error"],
        pictures=tuple(json.loads(row["pictures"])),
        facts=json.loads(row["facts"]),
    )

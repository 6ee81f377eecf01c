"""Jobs outlive the process, each state once."""

import sqlite3

import pytest
from eff_studio.store import Jobs
from eff_studio.work import Generate, Segment


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs(tmp_path / "deep" / "studio.db")
    yield jobs
    jobs.close()


def test_first_come_first_served(jobs):
    first, second = jobs.add(Generate(prompt="a")), jobs.add(Segment(picture="0", phrase="b"))
    assert jobs.waiting() == 2
    assert jobs.ahead_of(second) == 1
    running = jobs.start_next()
    assert (running.id, running.state, running.work) == (first.id, "running", first.work)
    assert running.started >= running.created
    assert jobs.start_next().id == second.id
    assert jobs.start_next() is None
    jobs.end(first.id, "done", pictures=("p",), facts={"point": [1, 2]})
    done = jobs.get(first.id)
    assert (done.state, done.pictures, done.facts) == ("done", ("p",), {"point": [1, 2]})
    assert done.ended >= done.started
    assert [job.id for job in jobs.latest(5)] == [second.id, first.id]
    assert [job.id for job in jobs.latest(5, before=second.created)] == [first.id]


def test_jobs_of_a_killed_process_wait_again(tmp_path):
    path = tmp_path / "studio.db"
    killed = Jobs(path)
    job = killed.add(Generate(prompt="a", seed=7))
    ended = killed.add(Generate(prompt="b"))
    killed.start_next()
    killed.end(ended.id, "failed", error="why")
    jobs = Jobs(path)  # the file is not closed: as after kill -9
    assert jobs.get(job.id).state == "waiting"
    assert jobs.get(ended.id).error == "why"
    assert jobs.start_next().work.seed == 7
    jobs.close()
    killed.close()


def test_cancel_put_back_remove(jobs):
    job = jobs.add(Generate(prompt="a"))
    assert jobs.remove(job.id) is None  # it has not ended
    jobs.start_next()
    assert not jobs.cancel_waiting(job.id)
    jobs.put_back(job.id)
    assert jobs.get(job.id).state == "waiting"
    assert jobs.get(job.id).started is None
    assert jobs.cancel_waiting(job.id)
    assert jobs.remove(job.id).state == "cancelled"
    assert jobs.get(job.id) is None
    assert jobs.remove("nonsense") is None


def test_jobs_that_cannot_be_read_hide_no_others(jobs, caplog):
    bad, good = jobs.add(Generate(prompt="a")), jobs.add(Generate(prompt="b"))
    with jobs._change() as db:
        db.execute('update jobs set settings=\'{"prompt": "a", "future": 1}\' where id=?', (bad.id,))
    assert [job.id for job in jobs.latest(5)] == [good.id]
    assert jobs.start_next().id == good.id
    assert jobs.start_next() is None
    assert "future" in caplog.text


@pytest.mark.parametrize("newer", [True, False])
def test_other_files_are_refused(tmp_path, newer):
    path = tmp_path / "studio.db"
    if newer:
        db = sqlite3.connect(path)
        db.execute("pragma user_version=2")
        db.close()
    else:
        path.write_bytes(b"no database at all, but long enough to be looked at" * 20)
    with pytest.raises(ValueError, match="version 2" if newer else "not a database of eff-studio"):
        Jobs(path)

"""The server as a process: killed, started again, ended by a signal."""

import signal
from pathlib import Path

import pytest

FAKE = Path(__file__).parents[1] / "fake_studio.py"


@pytest.mark.slow
def test_jobs_outlive_a_kill_and_a_stop(serve, tmp_path):
    command = (FAKE, "--port", "0", "--data", tmp_path)
    with serve(*command) as served:
        done = served.wait(served.submit(prompt="x", steps=1), "done")
        running = served.submit(prompt="x", steps=40, seed=1)
        waiting = served.submit(prompt="x", steps=200, seed=2)
        served.wait(running, "running")
        served.process.kill()
        served.process.wait(30)
    with serve(*command) as served:
        assert served.call(f"/api/jobs/{done['id']}") == done
        finished = served.wait(running, "done")
        assert finished["settings"]["seed"] == 1
        assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
        served.wait(waiting, "running")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    from eff_studio.store import Jobs

    jobs = Jobs(tmp_path / "studio.db")
    assert jobs.get(waiting).state == "waiting"
    jobs.close()

import subprocess
import sys
import textwrap

import pytest
from eff_serve.engine.threads import on_a_thread_that_ends


def test_results_and_errors_come_back():
    assert on_a_thread_that_ends(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_a_thread_that_ends(lambda: 1 / 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_loading_leaves_no_pool_of_threads_behind():
    code = """
        import os, torch
        torch.set_num_threads(2)
        from eff_serve.engine import EngineConfig, load_engine
        before = len(os.listdir("/proc/self/task"))
        loaded = load_engine(progress=False)
        print(len(os.listdir("/proc/self/task")) - before)
        a = torch.randn(512, 512)
        a @ a
        print(len(os.listdir("/proc/self/task")) - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    after_loading, after_computing_here = map(int, run.stdout.split())
    assert after_loading == 0
    assert after_computing_here >= 1  # the count sees a pool where there is one

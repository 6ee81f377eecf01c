"""The page of all methods is that which the table of the tests gives."""

import subprocess
import sys


def test_the_page_is_as_the_table(root):
    tool = root / "tools" / "method_table.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"run `uv run tools/method_table.py`\n{done.stdout}{done.stderr}"

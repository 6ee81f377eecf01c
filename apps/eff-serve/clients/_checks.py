"""What each client is asked to do, and a way to run all of it and say how it went."""

from __future__ import annotations

import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable

MODEL = "SmolLM2-135M-Instruct"
URL = os.environ.get("EFF_SERVE_URL", "http://127.0.0.1:8000")
QUESTION = "What is the capital of France?"
WEATHER = "What is the weather in Paris, in celsius?"
SUNNY = "Sunny, 21 degrees celsius."


def run(*checks: Callable[[], object]) -> None:
    """Run the checks, print a line for each, and end with status 1 if one failed."""
    failed = False
    for check in checks:
        start = time.monotonic()
        try:
            found = check()
            if inspect.isawaitable(found):
                raise TypeError(f"{check.__name__} is asynchronous; run it inside")
            print(f"ok      {check.__name__} ({time.monotonic() - start:.1f} s)", flush=True)
        except Exception:
            failed = True
            print(f"FAILED  {check.__name__}", flush=True)
            traceback.print_exc()
    sys.exit(failed)


def need(holds: object, seen: object) -> None:
    """Fail with what was seen unless something holds."""
    if not holds:
        raise AssertionError(f"seen: {seen!r}")

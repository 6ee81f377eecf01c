"""Ten minutes of mixed work over HTTP: does the server's memory stay flat, and is every picture whole?

Run: python apps/eff-studio/bench/soak.py [--minutes 10]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from eff_kernels.testing import environment
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
SOURCES = (Path(__file__), Path(__file__).parents[1] / "src")
LAYERS = [{"prompt": "a dog", "box": [0, 0.3, 0.5, 0.9]}, {"prompt": "an apple", "box": [0.4, 0.2, 1, 0.8]}]


def megabytes(process: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Client:
    """What a busy page does."""

    def __init__(self, address: str) -> None:
        self.address, self.dice, self.kept = address, random.Random(0), []
        self.counts = dict.fromkeys(("done", "cancelled", "refused", "segmented", "removed"), 0)

    def send(self, path: str, body: object = None, method: str | None = None) -> bytes:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def finish(self, kind: str, settings: dict[str, object]) -> dict[str, object]:
        """Put work in line and listen to its end."""
        job = json.loads(self.send("/api/jobs", {"kind": kind, "settings": settings}))
        self.send(f"/api/jobs/{job['id']}/events")
        return json.loads(self.send(f"/api/jobs/{job['id']}"))

    def turn(self) -> None:
        """One piece of work of a random kind."""
        settings = {"prompt": "a dog and an apple", "seed": self.dice.randrange(10**6), "steps": 8}
        kind = self.dice.randrange(6)
        if kind == 0:
            settings |= {"layers": LAYERS}
        if kind == 1:
            settings |= {"heads": {"weights": [[2, 1, 1.0], [4, 0, 0.5]]}}
        if kind == 2 and self.kept:
            found = self.finish("segment", {"picture": self.kept[-1]["pictures"][0], "phrase": "the dog"})
            assert found["state"] == "done", found
            self.counts["segmented"] += 1
            return
        if kind == 3:
            job = json.loads(self.send("/api/jobs", {"kind": "generate", "settings": {**settings, "steps": 100}}))
            self.send(f"/api/jobs/{job['id']}/cancel", {})
            self.send(f"/api/jobs/{job['id']}/events")
            self.counts["cancelled"] += 1
            return
        if kind == 4:
            try:
                self.send("/api/pictures", b"\x89PNG not a picture", "POST")
            except urllib.error.HTTPError as error:
                if error.code != 400:
                    raise
                self.counts["refused"] += 1
            return
        job = self.finish("generate", settings)
        assert job["state"] == "done", job
        image = Image.open(io.BytesIO(self.send(f"/api/pictures/{job['pictures'][0]}.png")))
        image.load()
        assert image.size == (128, 128)
        self.counts["done"] += 1
        self.kept.append(job)
        if len(self.kept) > 20:
            gone = self.kept.pop(0)
            self.send(f"/api/jobs/{gone['id']}", method="DELETE")
            self.counts["removed"] += 1


def main() -> None:
    """Serve, work, watch the memory, write one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)  # as the server's
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-c", "from eff_studio.cli import main; main()"]
        process = subprocess.Popen(
            [*command, "--port", "0", "--threads", "1", "--data", data], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            client = Client(next(m[0] for line in process.stdout if (m := re.search(r"http://[\d.]+:\d+", line))))
            begun, seen = time.monotonic(), []
            while (now := time.monotonic() - begun) < 60 * minutes:
                client.turn()
                seen.append((now, megabytes(process.pid)))
        finally:
            process.terminate()
            status = process.wait(60)
    late = np.array([s for s in seen if s[0] > 60 * minutes / 3])  # the first third fills caches
    slope = float(np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0])
    line = {
        "op": "studio_soak", "minutes": minutes, "turns": len(seen), **client.counts, "exit": status,
        "megabytes_at_a_third": round(float(late[0, 1]), 1), "megabytes_at_the_end": round(float(late[-1, 1]), 1),
        "megabytes_per_minute": round(slope, 3), "check": {"ok": abs(slope) < 2 and status == 0},
        **environment("cpu", SOURCES),
    }  # fmt: skip
    print(json.dumps(line))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""A server process of the soundness benchmark, and a client that knows the right answers."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

PROMPTS = ["Once upon a time", "The capital of France is", "def add(a, b):", "Water boils at", "My name is"]


class Server:
    """A server on a port, from its start until it answers."""

    def __init__(self, *options, port, stderr=subprocess.DEVNULL, **environment):
        command = [sys.executable, "-c", "from eff_serve.cli import main; main()", "--port", str(port), *options]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", **environment}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=env)
        self.port, self.address = port, f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {self.process.poll()}")
            time.sleep(0.05)

    def megabytes(self):
        """Resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def post(self, path="/v1/completions", timeout=300, **body):
        """Status and body of a request."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def text(self, prompt, max_tokens=8):
        """A greedy answer, or the status of a refusal."""
        status, body = self.post(prompt=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
        return body["choices"][0]["text"] if status == 200 else status

    def stream(self, prompt="Once upon a time", max_tokens=200):
        """An open stream."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{self.address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)

    def places(self):
        """Requests that run or wait, and the part of the cache that they hold."""
        text = urllib.request.urlopen(f"{self.address}/metrics", timeout=30).read().decode()
        wanted = ("eff_num_requests_running{", "eff_num_requests_waiting{", "eff_kv_cache_usage_perc{")
        return [float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted)]

    def leaked(self, seconds=60):
        """What is still held once nobody asks for anything: 0 if all is right."""
        deadline = time.monotonic() + seconds
        while any(held := self.places()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return sum(held)

    def close(self):
        """End it; the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -9

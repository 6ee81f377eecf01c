"""The server inside a program: start it on a free port, talk to it with OpenAI's client, stop it.

uv run --group serve-test examples/serve_client.py
"""

import socket
import subprocess
import time
import urllib.request

from openai import OpenAI

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen(["eff-serve", f"--port={port}", "--quantize=int8", "--no-log-requests"])
try:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.2)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    model = client.models.list().data[0].id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for part in client.chat.completions.create(model=model, messages=question, temperature=0, stream=True):
        print(part.choices[0].delta.content or "", end="", flush=True)
    print()
finally:
    server.terminate()
    server.wait(60)

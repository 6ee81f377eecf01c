"""Fifty clients at once of which half leave early, and the end of the process."""

import asyncio
import json
import signal
import socket
import threading
import time
import urllib.request

import openai
import pytest

pytestmark = pytest.mark.slow

TOPICS = ["sea", "sun", "rain", "bread", "iron", "glass", "wool", "clock", "train", "bridge"]


def question(i):
    return [{"role": "user", "content": f"Write one line about {TOPICS[i % 10]}, number {i}."}]


def test_fifty_clients_of_which_half_leave(server, metric):
    async def ask(client, i, leave):
        stream = await client.chat.completions.create(
            model="SmolLM2-135M-Instruct", messages=question(i), temperature=0, max_tokens=24, stream=True
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if leave and text:
                await stream.close()
                return None
        return text

    async def all_at_once():
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key="x", max_retries=0, timeout=300
        ) as client:
            return await asyncio.gather(*(ask(client, i, leave=i % 2 == 1) for i in range(50)))

    async def one_by_one(numbers):
        async with openai.AsyncOpenAI(
            base_url=f"{server.address}/v1", api_key="x", max_retries=0, timeout=300
        ) as client:
            return [await ask(client, i, leave=False) for i in numbers]

    together = asyncio.run(all_at_once())
    assert together[1::2] == [None] * 25
    stayed = range(0, 50, 10)
    assert [together[i] for i in stayed] == asyncio.run(one_by_one(stayed))
    assert all(together[::2])
    deadline = time.monotonic() + 20
    while metric("eff_num_requests_running") + metric("eff_num_requests_waiting") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric("eff_num_requests_running") == metric("eff_num_requests_waiting") == 0
    assert metric("eff_kv_cache_usage_perc") == 0
    assert metric("eff_client_disconnects_total") >= 20


def test_sigterm_lets_a_running_answer_end(start_server):
    with start_server("--grace", "30") as running:
        host, port = running.address.removeprefix("http://").split(":")
        body = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{running.address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.readline().startswith(b"data: ")
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(OSError):  # noqa: PT011 - nobody listens any more; which error says so depends on the system
                socket.create_connection((host, int(port)), timeout=5)
            events = [line for line in response if line.startswith(b"data: ")]
        assert events[-1] == b"data: [DONE]\n"
        assert len(events) > 50
        assert running.process.wait(30) == 0


def test_an_answer_beyond_the_grace_is_cut_and_the_process_ends(start_server):
    with start_server("--grace", "1") as running:
        body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{running.address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        seen = threading.Event()
        lines = []

        def read():
            with urllib.request.urlopen(request, timeout=60) as response:
                for line in response:
                    lines.append(line)
                    seen.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert seen.wait(30)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(15) == 0
        reader.join(10)
        assert not reader.is_alive()
        events = [line for line in lines if line.startswith(b"data: ")]
        assert b'"code":"draining"' in events[-1]
        assert not [line for line in running.lines if "Traceback" in line]

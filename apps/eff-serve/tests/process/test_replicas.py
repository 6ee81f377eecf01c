"""Two replicas by Ray Serve: the answers of one process, streams side by side, cancelling, a replica that dies."""

import json
import threading
import time
import urllib.request

import pytest
from eff_serve.engine_config import EngineConfig
from eff_serve.names import EYES
from eff_serve.replicas import check_replicas

pytest.importorskip("ray")
pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(start_server):
    with start_server("--replicas", "2", "--threads", "1", "--kv-gib", "0.2") as running:
        assert "2 replicas of SmolLM2" in "".join(running.lines)
        yield running
    assert running.process.returncode == 0, "".join(running.lines)


def post(server, on_line=lambda line: None, **body):
    ask = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True, **body}
    request = urllib.request.Request(
        f"{server.address}/v1/completions", json.dumps(ask).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        if not body.get("stream"):
            return json.load(response)["choices"][0]["text"]
        text = ""
        for line in response:
            if line.startswith(b"data: {"):
                data = json.loads(line[6:])
                assert "error" not in data, data
                text += data["choices"][0]["text"]
                on_line(line)
        return text


def alone(smollm2, prompt, count):
    """The greedy answer of an engine in this process."""
    import asyncio

    from eff_serve.engine import Sampling, load_engine

    loaded = load_engine(EngineConfig(kv_gib=0.2), progress=False)
    loaded.engine.start()

    async def read():
        sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
        stream = loaded.engine.submit(loaded.tokenizer.encode(prompt), sampling)
        return [step.token async for step in stream]

    tokens = asyncio.run(read())
    loaded.engine.stop(0)
    return loaded.tokenizer.decode(tokens)


def test_answers_are_those_of_one_process(server, smollm2):
    expected = alone(smollm2, "Once upon a time", 24)
    texts = {}

    def ask(i):
        texts[i] = post(server, stream=i % 2 == 0)

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(300)
    assert set(texts.values()) == {expected}
    assert post(server, temperature=1.0, seed=7) == post(server, temperature=1.0, seed=7)


def running_requests(server):
    text = urllib.request.urlopen(f"{server.address}/metrics", timeout=10).read().decode()
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith(("eff_num_requests_running{", "eff_num_requests_waiting{"))
    )


def test_clients_that_leave_free_their_places(server):
    for _ in range(4):
        ask = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{server.address}/v1/completions", json.dumps(ask).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            response.readline()
    deadline = time.monotonic() + 30
    while running_requests(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running_requests(server) == 0
    assert post(server, max_tokens=2)


def test_a_replica_that_dies_loses_no_answer(server):
    psutil = pytest.importorskip("psutil")
    expected = post(server, max_tokens=120)
    seen, result = threading.Event(), []
    asker = threading.Thread(
        target=lambda: result.append(post(server, lambda line: seen.set(), max_tokens=120, stream=True))
    )
    asker.start()
    assert seen.wait(60)
    mine = psutil.process_iter(["cmdline"])
    killed = [p for p in mine if "ServeReplica:eff-serve" in " ".join(p.info["cmdline"] or ())]
    assert killed
    for process in killed:
        process.kill()
    asker.join(300)
    assert result == [expected]


def test_what_replicas_do_not_do_is_refused():
    with pytest.raises(ValueError, match="has eyes"):
        check_replicas(EngineConfig(model=EYES))

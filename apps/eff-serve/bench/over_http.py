"""What a client gets over HTTP: start, memory, first tokens, throughput, and the next turn of a long conversation.

Run it as ``nox -s bench -- serve over_http``, or by itself with ``--threads 2``. Each engine is a server process of its
own on the embedded model; the client speaks the streaming API. A record is one engine: the median of each figure, and
under ``values`` all that went into it. Other servers take part with ``--peer "NAME=COMMAND"``, where the words
``{folder}``, ``{gguf}`` and ``{port}`` stand for the model's folder, the 4-bit file that it comes from, and the port.
"""

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import eff_kernels
import httpx
from eff_embedded.language import smollm2_folder, smollm2_gguf
from eff_kernels.testing.records import environment

RESULTS = Path(__file__).parent / "results" / "over_http.jsonl"
TEXT = "\n".join(topics.values())  # Python's own reference manual
SYSTEM = "You answer questions about this text."
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 1}
ENGINES = {
    "eff int4": ["--quantize", "int4"],
    "eff int8": ["--quantize", "int8"],
    "eff int8, no prefix cache": ["--quantize", "int8", "--no-prefix-cache"],
    "eff bf16": ["--quantize", "none"],
}


class Server:
    """A server process, from its start until it answers."""

    def __init__(self, command, threads, port, *, ours):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        if not ours:
            environment.pop("PYTHONPATH", None)
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=None if ours else subprocess.DEVNULL
        )
        self.url = f"http://127.0.0.1:{port}"
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.perf_counter() - started > 180:
                raise RuntimeError(f"the server did not start: {shlex.join(command)}")
            time.sleep(0.02)
        self.ready = time.perf_counter() - started
        self.model = httpx.get(f"{self.url}/v1/models").json()["data"][0]["id"]

    def resident(self):
        """Resident memory in MB, and the most that it ever was, of the process and of those that it started."""
        processes, total = [self.process.pid], [0.0, 0.0]
        for pid in processes:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                processes += map(int, children.read_text().split())
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            found = dict(line.split(":", 1) for line in lines)
            total = [t + int(found[key].split()[0]) / 1000 for t, key in zip(total, ("VmRSS", "VmHWM"), strict=True)]
        return total

    def close(self):
        self.process.terminate()
        self.process.wait(30)


async def answer(client, model, messages, max_tokens, **fields):
    """Seconds to the first token, the text, how many tokens, and how many of the prompt were cached.

    Raises:
        ValueError: the answer has another length than was asked for.
    """
    body = {
        "model": model, "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip
    started, first, text, usage = time.perf_counter(), None, "", None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                first = time.perf_counter() - started if first is None else first
                text += piece
    if usage["completion_tokens"] != max_tokens:
        raise ValueError(f"{usage['completion_tokens']} tokens came; asked for {max_tokens}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return first, text, max_tokens, cached or 0


def asking(i, characters=200):
    return [{"role": "user", "content": f"{i}. Go on with this text: {TEXT[i * 997 : i * 997 + characters]}"}]


async def measure(server, rounds, batches):
    found, model = {}, server.model
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=64)) as client:
        await answer(client, model, asking(999), 8, **GREEDY)
        firsts = [(await answer(client, model, asking(i), 2, **GREEDY))[0] for i in range(3 * rounds)]
        found["first_60_ms"] = [1000 * s for s in firsts]
        longs = [(await answer(client, model, asking(100 + i, 2200), 2, **GREEDY))[0] for i in range(rounds)]
        found["first_512_ms"] = [1000 * s for s in longs]
        for batch in batches:
            for name, how in (("greedy", GREEDY), ("sampled", SAMPLED)):
                rates = []
                for r in range(rounds):
                    prompts = [asking(1000 * r + 20 * batch + i) for i in range(batch)]
                    started = time.perf_counter()
                    got = await asyncio.gather(*(answer(client, model, p, 64, **how) for p in prompts))
                    rates.append(sum(g[2] for g in got) / (time.perf_counter() - started))
                found[f"{name}_{batch}"] = rates
        turns, cached = [], 0
        for r in range(rounds):
            talk = [{"role": "system", "content": SYSTEM + TEXT[r * 20000 : r * 20000 + 12500]}]
            for question in ("What is this?", "Tell me more.", "And what else?"):
                talk.append({"role": "user", "content": question})
                first, text, _, cached = await answer(client, model, talk, 24, **GREEDY)
                talk.append({"role": "assistant", "content": text})
                turns.append((question, first))
        found["first_turn_3000_ms"] = [1000 * s for q, s in turns if q == "What is this?"]
        found["next_turn_3000_ms"] = [1000 * s for q, s in turns if q != "What is this?"]
        found["cached_tokens"] = [cached]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=["none", *ENGINES])
    parser.add_argument("--peer", action="append", default=[], help="another server, NAME=COMMAND")
    parser.add_argument("--port", type=int, default=8931)
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    sources = (Path(__file__).parents[1] / "src", Path(eff_kernels.__file__).parent)
    about = {"bench": "over_http", **environment("cpu", sources), "threads": options.threads}
    start = [sys.executable, "-c", "from eff_serve.cli import main; main()", "--no-log-requests", "--port", "{port}"]
    commands = {name: [*start, *ENGINES[name]] for name in options.engines if name != "none"}
    peers = {name: shlex.split(command) for name, _, command in (peer.partition("=") for peer in options.peer)}
    places = {
        "{port}": str(options.port), "{folder}": str(smollm2_folder(progress=False)),
        "{gguf}": str(smollm2_gguf()),
    }  # fmt: skip
    for name, words in (commands | peers).items():
        command = [places.get(word, word) for word in words]
        server = Server(command, options.threads, options.port, ours=name in commands)
        try:
            before = server.resident()[0]
            found = asyncio.run(measure(server, options.rounds, options.batches))
            resident, most = server.resident()
        finally:
            server.close()
        found |= {"ready_s": [server.ready], "mb_ready": [before], "mb_after": [resident], "mb_most": [most]}
        middles = {figure: statistics.median(values) for figure, values in found.items()}
        print(name)
        for figure, values in found.items():
            spread = f"({min(values):.1f} to {max(values):.1f}, n={len(values)})"
            print(f"  {figure:20} {middles[figure]:10.1f}   {spread}", flush=True)
        values = {figure: [round(v, 3) for v in values] for figure, values in found.items()}
        # every answer had the length that was asked for, or `answer` had raised
        record = {**about, "engine": name, "checked": True, "ok": True, **middles, "values": values}
        if not options.no_record:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

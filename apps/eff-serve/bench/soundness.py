"""Is the server sound? Broken requests, bad clients, overflow, ends of every kind, damaged models, minutes of load.

Run: python apps/eff-serve/bench/soundness.py [--fuzz 100000] [--socket 3000] [--minutes 10] [--parts ...]

Each part is a line of the record: how many, how they were answered, wrong texts (an answer that differs from that of a
quiet server), leaked places (requests or cache that are held once nobody asks), megabytes before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from _abuse import HEAD, broken_bytes, damage, dice_of, request, send, stalled
from _soundness_server import PROMPTS, Server
from eff_kernels.testing.records import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "soundness.jsonl"
SOURCES = (*HERE.glob("*.py"), HERE.parent / "src")
PORT = 8967
START = [sys.executable, "-c", "from eff_serve.cli import main; main()"]


def fuzz(options):
    """Spoilt bodies against the app in this process, with an engine that answers at once."""
    from eff_serve.api import Settings, create_app

    tests = runpy.run_path(str(HERE.parent / "tests" / "api" / "test_fuzz.py"))
    fakes = runpy.run_path(str(HERE.parent / "tests" / "api" / "conftest.py"))
    engine, tokenizer = fakes["FakeEngine"](), fakes["BytesTokenizer"]()
    app = create_app(engine, tokenizer, Settings(model_id="fake"))
    whole, spoilt, dice = tests["WHOLE"], tests["spoilt"], dice_of(1)
    statuses, internal = Counter(), 0

    async def ask(path, body):
        messages, sent = [{"type": "http.request", "body": body}], []

        async def receive():
            if messages:
                return messages.pop()
            return await asyncio.Future()  # the client stays

        async def write(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("test", 80), "client": None, "root_path": "",
        }  # fmt: skip
        await app(scope, receive, write)
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])

    async def run():
        nonlocal internal
        paths = list(whole)
        for number in range(options.fuzz):
            path = paths[number % len(paths)]
            if number % 5 == 4:
                text = json.dumps(whole[path])
                at = dice.randrange(len(text))
                body = (
                    text[:at] + dice.choice(["", "\x00", "}", '"', "1e999", "NaN", "[" * 70]) + text[at + 1 :]
                ).encode()
            else:
                body = json.dumps(spoilt(whole[path], dice)).encode()
            status, answer = await ask(path, body)
            statuses[status] += 1
            internal += b"internal_error" in answer or status >= 500
            if number % 1000 == 0:
                engine.streams.clear()
                engine.submitted.clear()

    asyncio.run(run())
    return {"requests": options.fuzz, "statuses": dict(statuses), "internal errors": internal}


class Checked:
    """A running server whose right answers are known; counts texts that differ and places that stay."""

    def __init__(self, *options):
        self.server = Server("--quantize", "int4", "--kv-gib", "0.25", "--no-log-requests", *options, port=PORT)
        self.right = {p: self.server.text(p) for p in PROMPTS}
        self.before = self.server.megabytes()
        self.wrong = self.checked = 0

    def check(self):
        """Ask all prompts again."""
        for prompt, text in self.right.items():
            self.checked += 1
            self.wrong += self.server.text(prompt) != text

    def outcome(self):
        """What the record says of this server; ends it."""
        self.check()
        found = {
            "texts checked": self.checked, "wrong texts": self.wrong, "leaked places": self.server.leaked(),
            "MB before": round(self.before), "MB after": round(self.server.megabytes()),
        }  # fmt: skip
        return found | {"exit status": self.server.close()}


def wire(options):
    """Broken requests over a socket."""
    checked, dice, answers = Checked(), dice_of(2), Counter()
    for number in range(options.socket):
        answer = send(PORT, broken_bytes(dice), half_close=True)
        answers[answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/") else "closed"] += 1
        if number % 500 == 0:
            checked.check()
    return {"requests": options.socket, "statuses": dict(answers), **checked.outcome()}


def clients(options):
    """Slow readers, half-open and half-closed connections, clients that leave."""
    checked = Checked()
    server = checked.server
    slow = [server.stream(max_tokens=300) for _ in range(8)]
    open_ = stalled(PORT, HEAD, 50) + stalled(PORT, HEAD + b"Content-Length: 100\r\n\r\n{", 50)
    begun = time.monotonic()
    checked.check()
    beside = time.monotonic() - begun
    for _ in range(20):
        for stream in slow:
            stream.read(1)
        time.sleep(0.05)
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True}).encode()
    closed = [send(PORT, request(body), half_close=True, seconds=20) for _ in range(20)]
    answered = sum(json.dumps(checked.right[PROMPTS[0]]).encode() in answer for answer in closed)
    for number in range(200):
        with suppress(OSError):
            stream = server.stream(max_tokens=300)
            for _ in range(number % 4):
                stream.readline()
            stream.close()
    for stream in slow:
        stream.close()
    for connection in open_:
        connection.close()
    return {
        "slow readers": len(slow), "half-open": len(open_), "seconds of five answers beside them": round(beside, 2),
        "half-closed": len(closed), "half-closed that were answered whole": answered, "left early": 200,
        **checked.outcome(),
    }  # fmt: skip


def overflow(options):
    """More requests than places, prompts beyond the cache and beyond the model."""
    checked = Checked("--max-waiting", "16")
    server, statuses, wrong = checked.server, Counter(), 0
    found = []

    def ask(prompt):
        found.append((prompt, server.text(prompt)))

    askers = [threading.Thread(target=ask, args=(PROMPTS[i % 5],)) for i in range(150)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for prompt, text in found:
        statuses[text if isinstance(text, int) else 200] += 1
        wrong += isinstance(text, str) and text != checked.right[prompt]
    long = [PROMPTS[i] + " and" * 1500 for i in range(4)]  # together more than the cache of 0.25 GiB holds
    alone = [server.text(prompt, 4) for prompt in long]
    together = {}
    askers = [threading.Thread(target=lambda p=p: together.update({p: server.text(p, 4)})) for p in long]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    wrong += sum(together[p] != text for p, text in zip(long, alone, strict=True))
    beyond = [server.text("word " * 20000) for _ in range(3)]
    checked.wrong += wrong
    checked.checked += len(found) + len(long)
    return {
        "requests at once": 150, "statuses": {str(k): v for k, v in statuses.items()},
        "prompts beyond the cache together": len(long),
        "prompts beyond the model": Counter(map(str, beyond)),
        **checked.outcome(),
    }  # fmt: skip


def ends(options):
    """SIGTERM amid fifty streams, then SIGKILL and a new start on the same port."""
    server = Server("--quantize", "int4", "--no-log-requests", "--grace", "4", port=PORT)
    right = server.text(PROMPTS[0], 40)
    lasts, texts = [], []

    def read():
        last, text = b"", ""
        with suppress(OSError), server.stream(PROMPTS[0], 40) as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    last = line
                    if line.startswith(b"data: {") and b'"choices"' in line:
                        text += json.loads(line[6:])["choices"][0]["text"]
        lasts.append(last)
        texts.append(text)

    readers = [threading.Thread(target=read) for _ in range(50)]
    for reader in readers:
        reader.start()
    time.sleep(1.5)
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(60)
    for reader in readers:
        reader.join()
    whole = sum(last.startswith(b"data: [DONE]") for last in lasts)
    told = sum(b'"error"' in last for last in lasts)
    wrong = sum(not right.startswith(text) for text in texts)
    server = Server("--quantize", "int4", "--no-log-requests", port=PORT)
    streams = [server.stream() for _ in range(5)]
    server.process.kill()
    server.process.wait()
    for stream in streams:
        stream.close()
    again = Server("--quantize", "int4", "--no-log-requests", port=PORT)
    wrong += again.text(PROMPTS[0], 40) != right
    return {
        "streams at SIGTERM": 50, "whole": whole, "told that they were cut": told,
        "neither": 50 - whole - told, "exit status": status, "wrong texts": wrong,
        "leaked places": again.leaked(), "exit status after kill -9 and a new start": again.close(),
    }  # fmt: skip


def disk(options):
    """A log that cannot be written, and a cache folder on a full disk."""
    with Path("/dev/full").open("wb") as full:
        server = Server("--quantize", "int4", port=PORT, stderr=full)
        texts = {server.text(PROMPTS[0]) for _ in range(20)}
        status = server.close()
    found = {"answers with a full log": 20, "wrong texts": len(texts) - 1, "exit status": status}
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=False).returncode:
            return {**found, "cache on a full disk": "not run: no right to mount"}
        try:
            command = [*START, "generate", "Hi", "--max-tokens", "1"]
            env = {**os.environ, "EFF_CACHE_DIR": folder, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, check=False)
        finally:
            subprocess.run(["umount", folder], check=True)
    said = done.stderr.strip().splitlines()
    return {
        **found, "cache on a full disk": {
            "exit status": done.returncode, "says": said[-1][:200] if said else "",
            "traceback": "Traceback" in done.stderr,
        },
    }  # fmt: skip


def models(options):
    """Damaged folders of a small model: refused with a reason, or loaded where the damage is none."""
    code = (
        "import sys\nfrom eff_serve.engine import EngineConfig, load_engine\n"
        "for folder in sys.stdin.read().split('\\n'):\n"
        "    try:\n        load_engine(EngineConfig(model=folder, kv_gib=0.01), progress=False); print('loaded')\n"
        "    except Exception as error:\n        print(f'{type(error).__name__}', flush=True)\n"
    )
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    outcomes = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128,
            )
        ).save_pretrained(folder)  # fmt: skip
        from eff_embedded.language import smollm2_folder

        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((smollm2_folder(progress=False) / name).read_bytes())
        dice = dice_of(3)
        copies = [str(Path(place) / str(i)) for i in range(options.models)]
        for copy in copies:
            damage(folder, copy, dice)
        done = subprocess.run(
            [sys.executable, "-c", code], input="\n".join(copies), capture_output=True, text=True, check=False
        )
        outcomes.update(done.stdout.split())
    return {"damaged folders": options.models, "outcomes": dict(outcomes), "exit status": done.returncode}


def soak(options):
    """Minutes of mixed load."""
    checked = Checked()
    server, dice, counts = checked.server, random.Random(4), Counter()
    end, samples = time.monotonic() + 60 * options.minutes, []
    lock = threading.Lock()

    def work(seed):
        own = random.Random(seed)
        while time.monotonic() < end:
            kind = own.choice(["text", "text", "chat", "leave", "bad", "sampled"])
            if kind == "text":
                prompt = own.choice(PROMPTS)
                differs = server.text(prompt) != checked.right[prompt]
                with lock:
                    checked.checked += 1
                    checked.wrong += differs
            elif kind == "leave":
                with suppress(OSError):
                    stream = server.stream(own.choice(PROMPTS) + str(own.random()), 100)
                    stream.readline()
                    stream.close()
            elif kind == "bad":
                send(PORT, broken_bytes(own), half_close=True)
            elif kind == "chat":
                server.post(
                    "/v1/chat/completions", messages=[{"role": "user", "content": str(own.random())}], max_tokens=12
                )
            else:
                server.post(prompt=own.choice(PROMPTS) + " x" * own.randrange(200), max_tokens=6, temperature=1.0)
            with lock:
                counts[kind] += 1

    workers = [threading.Thread(target=work, args=(dice.random(),)) for _ in range(6)]
    for worker in workers:
        worker.start()
    while time.monotonic() < end:
        time.sleep(5)
        samples.append(round(server.megabytes()))
    for worker in workers:
        worker.join()
    quarter = max(1, len(samples) // 4)
    return {
        "minutes": options.minutes, "requests": dict(counts), "MB every five seconds": samples,
        "MB in the second quarter": max(samples[quarter : 2 * quarter] or samples),
        "MB in the last quarter": max(samples[-quarter:]), **checked.outcome(),
    }  # fmt: skip


PARTS = {f.__name__: f for f in (fuzz, wire, clients, overflow, ends, disk, models, soak)}


def main():
    """Run the parts that are asked for, and add them to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--fuzz", type=int, default=100_000)
    parser.add_argument("--socket", type=int, default=3000)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_args()
    about = environment("cpu", SOURCES)
    for name in options.parts:
        begun = time.monotonic()
        found = PARTS[name](options)
        sound = all(not found.get(key) for key in ("wrong texts", "leaked places", "internal errors", "neither"))
        sound &= all(not value for key, value in found.items() if key.startswith("exit status"))
        record = {
            "op": "serve_soundness",
            "part": name,
            **found,
            "seconds": round(time.monotonic() - begun),
            "ok": sound,
        }
        print(json.dumps(record), flush=True)
        if not options.no_record:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, **about}) + "\n")


if __name__ == "__main__":
    main()

"""Several models in one server: loaded when asked for, answers right, memory given back."""

import json
import shutil
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_models_take_turns_within_a_memory_limit(start_server, smollm2, tiny_model, tmp_path):
    tiny = shutil.copytree(tiny_model("llama"), tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (smollm2 / name).is_file():  # any tokenizer will do, as long as its ids fit
            (tiny / name).write_bytes((smollm2 / name).read_bytes())

    def resident():
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def call(path, **body):
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(running.address + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def answer(model):
        ask = {"prompt": [1, 5, 9], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        (choice,) = call("/v1/completions", model=model, **ask)["choices"]
        return choice["logprobs"]["token_logprobs"]

    models = ("--model", f"small={tiny}", "--model", f"large={smollm2}")
    with start_server(*models, "--memory-limit", "0.3", "--kv-gib", "0.1") as running:
        assert [m["state"] for m in call("/v1/models")["data"]] == ["unloaded", "unloaded"]
        small, large = answer("small"), answer("large")
        assert [m["name"] for m in call("/api/ps")["models"]] == ["large"]
        assert small != large
        peak = resident()
        for _ in range(3):
            assert answer("small") == small
            assert peak - resident() > 100  # the weights of the large one are given back
            assert answer("large") == large
        assert resident() < peak + 60

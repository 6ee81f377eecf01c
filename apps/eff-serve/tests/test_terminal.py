"""The terminal commands as processes, on the embedded model."""

import json
import subprocess
import sys

import pytest

START = "from eff_serve.cli import main; main()"


def eff_serve(*arguments, text="", timeout=180):
    return subprocess.run(
        [sys.executable, "-c", START, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.slow
def test_generate(smollm2):
    done = eff_serve("generate", "What is the capital of France?", "--max-tokens", "12")
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr


@pytest.mark.slow
def test_chat_saves_and_forgets(smollm2, tmp_path):
    saved = tmp_path / "talk.json"
    lines = [
        "What is the capital of France?",
        f"/save {saved}",
        f"/save {tmp_path / 'missing' / 'x.json'}",
        "/unknown",
        "/system You answer in one word.",
        f"/save {tmp_path / 'second.json'}",
        "/quit",
    ]
    done = eff_serve("chat", "--temperature", "0", "--max-tokens", "12", text="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["user", "assistant"]
    assert talk[1]["content"] == "The capital of France is Paris."
    assert "No such file" in done.stdout
    assert json.loads((tmp_path / "second.json").read_text()) == [
        {"role": "system", "content": "You answer in one word."}
    ]


def test_help_needs_no_torch():
    code = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); " + START
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no/such/folder"], "no such folder"),
        (["--quantize", "int3"], "int3"),
        (["--max-model-len", "100000"], "must be 1 to 8192"),
        (["--kv-gib", "0.01", "--max-model-len", "8192"], "more memory"),
        (["--max-batch", "0"], "max_batch must be 1 or more, got 0"),
        (["--threads", "0"], "threads must be 1 or more, got 0"),
        (["--replicas", "2", "--threads", "0"], "threads must be 1 or more, got 0"),
        (["--threshold", "nan"], "threshold must be 0 or more, got nan"),
        (["generate", "Hi", "--max-tokens", "0"], "max_tokens must be 1 or more, got 0"),
        (["chat", "--temperature", "-1"], "temperature must be 0 or more, got -1"),
    ],
)
def test_bad_settings_end_with_a_message(smollm2, arguments, says):
    done = eff_serve(*arguments, timeout=60)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

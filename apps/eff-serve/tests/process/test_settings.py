"""What the command line sets: keys, the log, a port that is taken."""

import re
import socket

import openai
import pytest

pytestmark = pytest.mark.slow


def test_keys_and_log(start_server, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    with start_server("--api-key-file", str(keys)) as running:

        def ask(key):
            with openai.OpenAI(base_url=f"{running.address}/v1", api_key=key, max_retries=0, timeout=60) as client:
                return client.completions.create(model="SmolLM2-135M-Instruct", prompt="A", max_tokens=3, user="ann")

        with pytest.raises(openai.AuthenticationError):
            ask("wrong-key")
        assert ask("second-key").usage.completion_tokens <= 3
    (line,) = [line for line in running.lines if "user=" in line]
    assert re.search(r"INFO cmpl-\w+ user='ann' prompt_tokens=1 completion_tokens=\d finished=length", line)
    assert not any("-key\n" in line or "first-key" in line for line in running.lines)


def test_a_taken_port_is_named_and_the_log_can_be_off(start_server):
    with start_server("--no-log-requests") as running:
        with openai.OpenAI(base_url=f"{running.address}/v1", api_key="x", max_retries=0, timeout=60) as client:
            client.completions.create(model="SmolLM2-135M-Instruct", prompt="A", max_tokens=1)
        port = running.address.rpartition(":")[2]
        with (
            pytest.raises(AssertionError, match=rf"(?s)exit status [1-9].*{port}.*address already in use"),
            start_server("--port", port),
        ):
            pass
        with socket.create_connection(("127.0.0.1", int(port))):
            pass
    assert not any("user=" in line for line in running.lines)

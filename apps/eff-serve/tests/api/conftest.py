"""An app on an engine that says what a test tells it to, over a vocabulary of bytes."""

import asyncio
import codecs
import json

import pytest
from eff_serve.api import Settings, create_app
from eff_serve.engine.types import EngineStats, Step, TokenScore
from eff_serve.models.dialects import HERMES
from starlette.testclient import TestClient

EOS = 256
VOCAB = 258


class BytesDecoder:
    def __init__(self, skip_special_tokens):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._special = "" if skip_special_tokens else "<special>"

    def push(self, token):
        return self._decoder.decode(bytes([token])) if token < 256 else self._special

    def flush(self):
        return self._decoder.decode(b"", True)


class BytesTokenizer:
    """Token i is byte i; 256 ends a text, 257 is a special token."""

    vocab_size = VOCAB
    eos_token_ids = frozenset({EOS})
    dialect = HERMES
    thinks = False

    def marker(self, text):
        return None

    def encode(self, text, *, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, *, skip_special_tokens=False):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b""

    def encode_chat(
        self,
        messages,
        *,
        tools=None,
        add_special_tokens=False,
        add_generation_prompt=True,
        continue_final_message=False,
        more=None,
    ):
        self.laid_out = {"messages": messages, "tools": tools}
        text = "|".join(f"{m['role']}:{m['content']}" for m in messages)
        return self.encode(text + ("|assistant:" if add_generation_prompt else ""))

    def decoder(self, *, skip_special_tokens=True):
        return BytesDecoder(skip_special_tokens)


class FakeStream:
    """Plays a script of steps; None in a script waits until the stream is cancelled."""

    def __init__(self, engine, steps):
        self._engine, self._steps = engine, steps
        self.cancelled = False
        self._waiting = asyncio.Event()

    async def __aiter__(self):
        for step in self._steps:
            if self.cancelled:
                return
            if step is None:
                await self._waiting.wait()
                yield Step(finish_reason="cancelled")
                return
            await asyncio.sleep(0)
            yield step

    def cancel(self):
        self.cancelled = True
        self._waiting.set()


class FakeEngine:
    """Answers with ``text`` (or ``steps``), one byte a token, then end-of-text; raises ``refusal`` at submit."""

    max_model_len = 500

    def __init__(self):
        self.text: str | bytes = "Hello"
        self.steps = None
        self.refusal = None
        self.submitted = []
        self.streams = []

    def submit(self, prompt, sampling, pictures=None):
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append((prompt, sampling))
        self.streams.append(FakeStream(self, self.steps or self._script(prompt, sampling)))
        return self.streams[-1]

    def _script(self, prompt, sampling):
        data = self.text.encode() if isinstance(self.text, str) else self.text
        tokens = [*data, EOS]
        steps = []
        if sampling.prompt_logprobs is not None:
            scores = tuple(self._score(t, sampling.prompt_logprobs) for t in prompt[1:])
            done = "length" if sampling.max_tokens == 0 else None
            steps.append(Step(prompt_scores=scores, finish_reason=done))
        elif sampling.max_tokens == 0:
            steps.append(Step(finish_reason="length"))
        tokens = tokens[: sampling.max_tokens]
        for i, token in enumerate(tokens):
            reason = "stop" if token == EOS or token in sampling.stop_token_ids else None
            if reason is None and i + 1 == sampling.max_tokens:
                reason = "length"
            score = None if sampling.logprobs is None else self._score(token, sampling.logprobs)
            steps.append(Step(token=token, score=score, finish_reason=reason))
            if reason:
                break
        return steps

    @staticmethod
    def _score(token, top):
        others = [(token, -0.5), *((t, -1.0 - t) for t in range(65, 65 + 20))]
        return TokenScore(token, -0.5, tuple(others[:top]))

    def stats(self):
        running = sum(not s.cancelled for s in self.streams)
        return EngineStats(running, 0, min(1.0, running / 8))

    def start(self):
        pass

    def stop(self, grace):
        for stream in self.streams:
            stream.cancel()


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def tokenizer():
    return BytesTokenizer()


@pytest.fixture
def make_client(engine, tokenizer):
    """``make_client(**settings)``: client of an app with these settings."""

    def make(**settings):
        app = create_app(engine, tokenizer, Settings(model_id="fake", **settings))
        return TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def chat(client):
    """``chat(**fields)``: POST a conversation of one message."""

    def post(**fields):
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return client.post("/v1/chat/completions", json=body)

    return post


@pytest.fixture
def complete(client):
    """``complete(**fields)``: POST a text to continue."""
    return lambda **fields: client.post("/v1/completions", json={"prompt": "hi", **fields})


@pytest.fixture
def events():
    """``events(response)``: the data of each event, parsed; ``[DONE]`` stays text."""

    def parse(response):
        blocks = response.text.split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        data = [block.removeprefix("data: ") for block in blocks]
        return [d if d == "[DONE]" else json.loads(d) for d in data]

    return parse

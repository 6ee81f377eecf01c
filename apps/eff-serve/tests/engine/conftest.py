"""A stand-in for the decoder whose logits are a hash of the tokens in its pages, and ways to drive an engine."""

import asyncio
import json
from dataclasses import dataclass, field

import pytest
import torch
from eff_serve.engine.decoder import PAGE
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.types import Sampling
from eff_serve.engine_config import EngineConfig

VOCAB, EOS = 50, 3


@dataclass
class FakeConfig:
    vocab_size: int = VOCAB
    max_model_len: int = 512
    eos_token_ids: frozenset = frozenset({EOS})


@dataclass
class HashDecoder:
    """Writes tokens into pages as the real one writes keys, so a page mixed up between requests changes the text."""

    num_pages: int = 64
    config: FakeConfig = field(default_factory=FakeConfig)
    fail_on: int | None = None  # a token whose sight raises
    batches: list = field(default_factory=list)
    on_write: object = None  # called with each page before a token is written to it

    def __post_init__(self):
        self.cache = torch.full((self.num_pages, PAGE), -1)

    def write(self, page, place, token):
        if self.on_write is not None:
            self.on_write(int(page))
        self.cache[page, place] = token

    def copy_page(self, source, target, count):
        if self.on_write is not None:
            self.on_write(target)
        self.cache[target] = -1
        self.cache[target, :count] = self.cache[source, :count]

    def logits(self, history):
        if self.fail_on in history:
            raise RuntimeError("the fake decoder was told to fail")
        seed = 0
        for token in history:
            seed = (seed * 1000003 + token + 1) % 2**61
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))

    def prefill(self, tokens, start, pages, *, all_logits=False):
        for i, token in enumerate(tokens.tolist(), start):
            self.write(pages[i // PAGE], i % PAGE, token)
        history = self.cache[pages].flatten().tolist()
        end = start + tokens.numel()
        self.batches.append(("prefill", tokens.numel()))
        rows = range(start + 1, end + 1) if all_logits else [end]
        return torch.stack([self.logits(history[:n]) for n in rows])

    def decode(self, tokens, positions, block_table):
        self.batches.append(("decode", tokens.numel()))
        rows = []
        for token, position, table in zip(tokens.tolist(), positions.tolist(), block_table, strict=True):
            self.write(table[position // PAGE], position % PAGE, token)
            rows.append(self.logits(self.cache[table].flatten()[: position + 1].tolist()))
        return torch.stack(rows)


@pytest.fixture
def hash_decoder():
    return HashDecoder


@pytest.fixture
def tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({}))
    return path


@pytest.fixture
def make_engine(tokenizer_file):
    """``make_engine(decoder, **settings)`` gives a started engine; it is stopped at the end, whatever happened."""
    started = []

    def make(decoder, **settings):
        file = settings.pop("tokenizer_file", tokenizer_file)
        engine = BatchEngine(decoder, EngineConfig(**settings), tokenizer_file=file)
        engine.start()
        started.append(engine)
        return engine

    yield make
    for engine in started:
        engine.stop(0.0)


@pytest.fixture
def ask():
    """``ask(engine, [(prompt, settings), ...])`` sends all at once and returns the list of steps of each."""

    async def read(stream):
        return [step async for step in stream]

    async def all_of(engine, requests):
        streams = [engine.submit(list(prompt), Sampling(**settings)) for prompt, settings in requests]
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 120)

    return lambda engine, requests: asyncio.run(all_of(engine, requests))

"""The waiting line goes by priority, and by arrival among equals."""

import asyncio

from eff_serve.engine.decoder import Decoder
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.types import Sampling
from eff_serve.engine_config import EngineConfig


def test_smaller_numbers_are_served_first(tiny_model, smollm2):
    decoder = Decoder(tiny_model("llama"), num_pages=16)
    engine = BatchEngine(decoder, EngineConfig(max_batch=1), tokenizer_file=smollm2 / "tokenizer.json")
    given = {"a": 0, "late": 5, "b": 0, "first": -1, "c": 0, "urgent": -2}
    ended = []

    async def read(name, stream):
        async for _ in stream:
            pass
        ended.append(name)

    async def all_of_them():
        wanted = {n: Sampling(max_tokens=3, temperature=0, ignore_eos=True, priority=p) for n, p in given.items()}
        streams = {name: engine.submit([5, 7], sampling) for name, sampling in wanted.items()}
        engine.start()
        await asyncio.gather(*(read(name, stream) for name, stream in streams.items()))

    asyncio.run(all_of_them())
    engine.stop(0)
    assert ended == ["urgent", "first", "a", "b", "c", "late"]

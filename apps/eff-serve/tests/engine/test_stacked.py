"""Stored weights, adapters and steering in one batch: each request answers as if it were alone."""

import asyncio

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig
from eff_serve.engine.decoder import Decoder
from eff_serve.engine.steering import Steering
from eff_serve.engine.types import Sampling

PROMPT = [5 + 7 * i % 90 for i in range(40)]
ACT = Steering(act=ACTConfig(layers=(0, 1, 2), threshold=("relative", 1.5), min_rows=2))
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def ask(engine, requests):
    async def read(stream):
        return [(step.token, step.score.logprob) async for step in stream]

    async def all_of():
        usual = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
        streams = [engine.submit(list(PROMPT), Sampling(**usual, **request)) for request in requests]
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 120)

    return asyncio.run(all_of())


@pytest.mark.parametrize("quantize", [None, "int8", "nvfp4"])
def test_one_batch_of_adapters_and_steering_answers_as_if_alone(tiny_model, make_engine, adapter, quantize):
    decoder = Decoder(tiny_model("llama"), num_pages=64, quantize=quantize)
    decoder.load_adapters({"own": adapter})
    engine = make_engine(decoder, chunk=16, max_batch=4)
    requests = [{}, {"adapter": "own"}, {"steering": ACT}, {"adapter": "own", "steering": ACT}]
    alone = [ask(engine, [request])[0] for request in requests]
    for together, by_itself in zip(ask(engine, requests), alone, strict=True):
        assert [token for token, _ in together] == [token for token, _ in by_itself]
        scores = [torch.tensor([score for _, score in answer]) for answer in (together, by_itself)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    assert len({tuple(score for _, score in answer) for answer in alone}) == len(requests)

"""Recorded decoding steps: the bits of the plain step, whatever is in the batch."""

import pytest
import torch
from eff_kernels import native
from eff_serve.engine.decoder import Decoder


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nvfp4", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased", "qwen2", "qwen3"])
def test_recorded_steps_give_the_bits_of_plain_ones(tiny_model, kind, quantize):
    if native.unavailable():
        pytest.skip(native.unavailable())
    decoder = Decoder(tiny_model(kind), quantize=quantize, num_pages=24)
    generator = torch.Generator().manual_seed(1)
    recorded, wanted = decoder._steps, decoder._plain_step
    for rows in (1, 3, 1, 5, 3):
        lengths = torch.randint(1, 60, (rows,), generator=generator)
        tables = torch.randperm(24, generator=generator)[: 2 * rows].view(rows, 2)
        prompts = [torch.randint(3, 131, (int(n),), generator=generator) for n in lengths]
        for prompt, pages in zip(prompts, tables, strict=True):
            decoder.prefill(prompt, 0, pages)
        for step in range(3):
            tokens = torch.randint(3, 131, (rows,), generator=generator)
            arguments = tokens, lengths + step, tables.int()
            decoder._steps = wanted
            plain = decoder.decode(*arguments)
            decoder._steps = recorded
            assert torch.equal(decoder.decode(*arguments), plain)
    # One and three sequences were recorded, five are too many; Qwen3's norms of several queries take a copy.
    assert recorded.recorded == (1 if kind == "qwen3" else 2)


def test_a_table_wider_than_the_model_is_long_goes_the_plain_way(tiny_model):
    decoder = Decoder(tiny_model("llama"), num_pages=24)
    decoder.prefill(torch.arange(3, 10), 0, torch.tensor([4]))
    table = torch.zeros(1, 20, dtype=torch.int32)
    table[0, 0] = 4
    wide = decoder.decode(torch.tensor([5]), torch.tensor([7]), table)
    assert decoder._steps.recorded == 0
    assert torch.equal(decoder.decode(torch.tensor([5]), torch.tensor([7]), table[:, :1]), wide)
    assert decoder._steps.recorded == 1

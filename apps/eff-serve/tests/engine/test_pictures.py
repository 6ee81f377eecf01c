"""Pictures in the decoder and the engine, on tiny random models, against transformers with eff-embedded's LoRA."""

import asyncio
import itertools

import pytest
import torch
from eff_embedded.eyes.lora import ARGUMENT, add_lora
from eff_kernels.testing import compare
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.types import Sampling
from eff_serve.pictures.prompt import LowRank, PromptPictures

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
PROMPT = [5, 6, 7, *[16] * 9, 8, 9, 10, *[16] * 9, 11, 12]
PLACES = [*range(3, 12), *range(15, 24)]


def lora_weights(targets, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {"o_proj": 64, "down_proj": 96}
    outputs = {**SIZES, "o_proj": 64, "down_proj": 64}
    weights = {}
    for layer in range(3):
        for target in targets:
            weights[f"{layer}.{target}.lora_a"] = torch.randn(4, inputs.get(target, 64), generator=generator) * 0.2
            weights[f"{layer}.{target}.lora_b"] = torch.randn(outputs[target], 4, generator=generator) * 0.2
    return weights


def pictures(seed=1):
    embeddings = torch.randn(len(PLACES), 64, generator=torch.Generator().manual_seed(seed))
    return PromptPictures(torch.tensor(PLACES), embeddings)


@pytest.fixture
def make_decoder(tiny_model):
    def make(targets=TARGETS, **settings):
        decoder = Decoder(tiny_model("llama"), num_pages=24, **settings)
        decoder.behind_pictures = LowRank.from_weights(lora_weights(targets), 3, SIZES)
        return decoder

    return make


@torch.inference_mode()
def reference(folder, targets, ids, seen):
    """Logits of every position from transformers, in float32 and float64."""
    from transformers import AutoModelForCausalLM

    out = []
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        add_lora(model.model, targets, 4)
        for name, tensor in lora_weights(targets).items():
            layer, target, kind = name.split(".")
            block = model.model.layers[int(layer)]
            getattr(getattr(block.self_attn, target, None) or getattr(block.mlp, target), kind).copy_(tensor)
        embeddings = model.model.embed_tokens(torch.tensor([ids]))
        embeddings[0, seen.places] = seen.embeddings.to(dtype)
        behind = (torch.arange(len(ids)) >= seen.first)[None]
        hidden = model.model(inputs_embeds=embeddings, **{ARGUMENT: behind}).last_hidden_state
        out.append(model.lm_head(hidden)[0])
    return out


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj", "down_proj")])
@pytest.mark.parametrize("cuts", [[], [1], [5, 20], [3, 15]])
def test_prefill_in_pieces_and_decoding_equal_transformers(tiny_model, make_decoder, targets, cuts):
    decoder, seen = make_decoder(targets), pictures()
    pages, after = torch.tensor([7, 2]), [20, 30, 40]
    edges, rows = [0, *cuts, len(PROMPT)], []
    for start, end in itertools.pairwise(edges):
        piece = torch.tensor(PROMPT[start:end])
        rows.append(decoder.prefill(piece, start, pages, all_logits=True, pictures=seen))
    for i, token in enumerate(after):
        position = torch.tensor([len(PROMPT) + i])
        rows.append(decoder.decode(torch.tensor([token]), position, pages[None].int(), torch.tensor([0])))
    eager, truth = reference(tiny_model("llama"), targets, PROMPT + after, seen)
    problem = compare(torch.cat(rows), eager.float(), truth, factor=4.0, name="logits")
    assert problem is None, problem


def test_lora_and_pictures_change_the_answer(make_decoder):
    decoder, pages = make_decoder(), torch.tensor([0, 1])
    with_pictures = decoder.prefill(torch.tensor(PROMPT), 0, pages, pictures=pictures())
    others = decoder.prefill(torch.tensor(PROMPT), 0, pages, pictures=pictures(seed=2))
    plain = decoder.prefill(torch.tensor(PROMPT), 0, pages)
    lora, decoder.behind_pictures = decoder.behind_pictures, None
    without_lora = decoder.prefill(torch.tensor(PROMPT), 0, pages, pictures=pictures())
    assert not torch.allclose(with_pictures, others, atol=0.1)
    assert not torch.allclose(with_pictures, without_lora, atol=0.1)
    assert torch.equal(plain, decoder.prefill(torch.tensor(PROMPT), 0, pages))
    assert lora.nbytes > 0


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_requests_with_and_without_pictures_are_answered_as_if_alone(make_decoder, make_engine, quantize):
    wanted = Sampling(max_tokens=2 * PAGE, temperature=0.0, ignore_eos=True, logprobs=0)
    requests = [
        (PROMPT, pictures()),
        ([9, 8, 7], None),
        (PROMPT, pictures(seed=2)),
        (PROMPT, None),
        (PROMPT[::-1], None),
    ]

    async def ask(engine, some):
        async def read(stream):
            return [(step.token, step.score.logprob) async for step in stream]

        streams = [engine.submit(list(prompt), wanted, seen) for prompt, seen in some]
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 120)

    engine = make_engine(make_decoder(quantize=quantize), chunk=7, max_batch=5)
    alone = [asyncio.run(ask(engine, [request]))[0] for request in requests]
    together = asyncio.run(ask(engine, requests))
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == len(requests)
    # Seven pages for five sequences of three or four: some are sent back and computed anew, pictures and all.
    tight = make_decoder(quantize=quantize)
    tight.num_pages = 7
    small = make_engine(tight, max_model_len=4 * PAGE, chunk=7, max_batch=5)
    again = asyncio.run(ask(small, requests))
    assert [[token for token, _ in answer] for answer in again] == [[token for token, _ in answer] for answer in alone]


def test_refusals(make_decoder, make_engine, tiny_model):
    async def submit(engine, prompt, seen):
        engine.submit(prompt, Sampling(max_tokens=1), seen)

    blind = make_engine(Decoder(tiny_model("llama"), num_pages=8))
    with pytest.raises(ValueError, match="reads text only"):
        asyncio.run(submit(blind, list(PROMPT), pictures()))
    engine = make_engine(make_decoder())
    with pytest.raises(ValueError, match="inside the prompt of 12 tokens"):
        asyncio.run(submit(engine, PROMPT[:12], pictures()))
    with pytest.raises(ValueError, match="of one length"):
        PromptPictures(torch.tensor([1, 2]), torch.zeros(3, 64))
    with pytest.raises(ValueError, match="for no projection"):
        LowRank.from_weights({"3.q_proj.lora_a": torch.zeros(4, 64)}, 3, SIZES)

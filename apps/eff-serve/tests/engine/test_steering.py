"""Steering of single requests in the engine, against the same methods on the same model in transformers."""

import asyncio
import contextlib

import pytest
import torch
from eff_attention.contrastive_focus import record_image_attention
from eff_attention.grounded_attention import PAIConfig, PAINTConfig, apply_paint
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from eff_attention.sink_calibration import ACTConfig, apply_act
from eff_attention.visual_sinks import VARConfig, apply_var
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.hf import HFDecoder
from eff_serve.engine.steering import Steering
from eff_serve.engine.types import Sampling
from eff_serve.engine.watch import PictureWatch
from eff_serve.pictures.eyes import TowerSaliency
from eff_serve.pictures.prompt import LowRank, PromptPictures

PROMPT = [5, 6, 7, *[16] * 9, 8, 9, 10, *[16] * 9, 11, 12]
PLACES = torch.tensor([*range(3, 12), *range(15, 24)])
TEXT = list(range(40, 75))
APPLY = {"vhr": apply_vhr, "paint": apply_paint, "pai": apply_paint, "var": apply_var, "act": apply_act}
ALL = (0, 1, 2)
ACT = ACTConfig(layers=ALL, threshold=("absolute", 0.15))
VAR = VARConfig(dims=tuple(range(64)), tau=2.6, rho=0.0, min_image_mass=0.0, first_layer=0, skip_last_layer=False)
CASES = {
    "none": None,
    "act": Steering(act=ACT),
    "var": Steering(var=VAR),
    "vhr": Steering(vhr=VHRConfig(layers=ALL)),
    "paint": Steering(paint=PAINTConfig(first_layer=0)),
    "pai": Steering(pai=PAIConfig(alpha=0.5, first_layer=1)),
    "three": Steering(var=VAR, vhr=VHRConfig(layers=ALL, alpha=1.5), act=ACT),
}
NOTHING = {
    "act": Steering(act=ACTConfig(layers=ALL, beta=1.0)),
    "var": Steering(var=VARConfig(dims=(3,), tau=7.9, first_layer=0)),
    "vhr": Steering(vhr=VHRConfig(layers=ALL, alpha=1.0)),
    "pai": Steering(pai=PAIConfig(alpha=0.0, first_layer=0)),
}


@pytest.fixture(scope="module")
def llava(tiny_model):
    """A tiny model with eyes in transformers, and what its eyes see of two pictures of noise."""
    from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    text = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=12, patch_size=4
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text.config, image_token_index=16, image_seq_length=9)
    ).eval()
    model.model.language_model, model.lm_head = text.model, text.lm_head
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        for p in model.model.vision_tower.parameters():
            p.normal_(0.0, 0.3)
        for p in model.model.multi_modal_projector.parameters():
            p.normal_(0.0, 0.3)
        saliency = TowerSaliency(model.model.vision_tower)
        seen = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
    return model, pixels, PromptPictures(PLACES, seen, saliency())


@pytest.fixture
def make_decoder(tiny_model):
    def make(**settings):
        decoder = Decoder(tiny_model("llama"), num_pages=settings.pop("num_pages", 64), **settings)
        decoder.behind_pictures = LowRank(({}, {}, {}))
        return decoder

    return make


def ask(engine, requests, tokens=30, watches=None):
    async def read(stream):
        return [(step.token, step.score.logprob) async for step in stream]

    async def all_of():
        streams = [
            engine.submit(
                list(prompt),
                Sampling(
                    max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=0, steering=steering, watch=watch
                ),
                seen,
            )
            for (prompt, steering, seen), watch in zip(requests, watches or [None] * len(requests), strict=True)
        ]
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 120)

    return asyncio.run(all_of())


def generated(model, steering, prompt, tokens=30, **inputs):
    """Tokens and their log-probabilities from transformers."""
    ids = torch.tensor([prompt])
    with contextlib.ExitStack() as stack:
        for order, name in enumerate(APPLY):
            config = None if steering is None else getattr(steering, name)
            if config is not None:
                stack.enter_context(APPLY[name](model, config, order=float(order)))
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **inputs,
        )
    scores = torch.cat(out.logits).log_softmax(-1)
    chosen = out.sequences[0, len(prompt) :]
    return chosen.tolist(), scores.gather(1, chosen[:, None])[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_transformers(make_decoder, make_engine, llava, name):
    model, pixels, seen = llava
    wanted, scores = generated(model, CASES[name], PROMPT, pixel_values=pixels)
    (found,) = ask(make_engine(make_decoder(), chunk=7), [(PROMPT, CASES[name], seen)])
    assert [token for token, _ in found] == wanted
    torch.testing.assert_close(torch.tensor([x for _, x in found]), scores, rtol=1e-3, atol=2e-4)
    if name not in ("none", "var"):  # patches of noise look alike, so that VAR moves next to nothing
        plain, others = generated(model, None, PROMPT, pixel_values=pixels)
        assert plain != wanted or (scores - others).abs().max() > 1e-2


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_one_batch_with_all_kinds_of_steering_answers_as_if_alone(make_decoder, make_engine, llava, quantize):
    seen = llava[2]
    requests = [(PROMPT, steering, seen) for steering in CASES.values()]
    requests += [(TEXT, None, None), (TEXT, Steering(act=ACT), None)]
    engine = make_engine(make_decoder(quantize=quantize), chunk=7, max_batch=9)
    alone = [ask(engine, [request], 2 * PAGE)[0] for request in requests]
    assert ask(engine, requests, 2 * PAGE) == alone
    assert len({tuple(answer) for answer in alone}) == len(requests)
    # Too few pages for nine: some are sent back and computed anew, with what their rules know.
    tight = make_engine(make_decoder(quantize=quantize, num_pages=14), chunk=7, max_batch=9, max_model_len=4 * PAGE)
    again = ask(tight, requests, 2 * PAGE)
    assert [[token for token, _ in answer] for answer in again] == [[token for token, _ in answer] for answer in alone]


@pytest.mark.parametrize("name", NOTHING)
def test_with_nothing_to_change_scores_stay_bit_for_bit(make_decoder, make_engine, llava, name):
    engine = make_engine(make_decoder(), chunk=64)
    plain, steered = ask(engine, [(PROMPT, None, llava[2]), (PROMPT, NOTHING[name], llava[2])])
    assert steered == plain


def test_a_text_that_begins_like_an_earlier_one_is_steered_from_its_beginning(make_decoder, make_engine):
    engine = make_engine(make_decoder(), chunk=16)
    (alone,) = ask(engine, [(TEXT, Steering(act=ACT), None)])
    ask(engine, [(TEXT, None, None)])
    (after,) = ask(engine, [(TEXT, Steering(act=ACT), None)])
    assert after == alone


def test_models_of_transformers_take_calibration(make_engine, tmp_path):
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    config = GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    config.initializer_range = 0.3
    model = GemmaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    engine = make_engine(HFDecoder(tmp_path, num_pages=16), chunk=7)
    assert engine.steering == ("act",)
    steering = [None, Steering(act=ACT), Steering(act=ACTConfig(layers=ALL, beta=0.0))]
    found = ask(engine, [(TEXT, one, None) for one in steering], 20)
    for one, answer in zip(steering, found, strict=True):
        wanted, scores = generated(model, one, TEXT, 20)
        assert [token for token, _ in answer] == wanted
        torch.testing.assert_close(torch.tensor([x for _, x in answer]), scores, rtol=1e-3, atol=2e-4)
    assert len({str(answer) for answer in found}) == 3
    with pytest.raises(ValueError, match="'pai' is not supported by this model; it supports 'act'"):
        ask(engine, [(TEXT, Steering(pai=PAIConfig()), None)])


ONE = [5, 6, 7, *[16] * 9, 8, 9, 10]


@pytest.mark.parametrize("layers", [None, (0, -1)])
def test_where_an_answer_looks_is_what_the_model_in_transformers_looks_at(make_decoder, make_engine, llava, layers):
    """Recorded alone, and beside others in too few pages, where sequences are sent back and begin anew."""
    model, pixels, seen = llava
    seen = PromptPictures(PLACES[:9], seen.embeddings[:9], seen.saliency)
    ids = torch.tensor([ONE])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels[:1]}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    wanted = record_image_attention(model, inputs, layers, max_new_tokens=2 * PAGE)
    request = [(ONE, None, seen)]
    engine = make_engine(make_decoder(), chunk=7)
    watch = PictureWatch(layers)
    (alone,) = ask(engine, request, 2 * PAGE, watches=[watch])
    assert [token for token, _ in alone] == wanted.ids.tolist()
    assert watch.maps.shape == wanted.maps.shape
    torch.testing.assert_close(watch.maps, wanted.maps, rtol=1e-3, atol=1e-5)
    assert ask(engine, request, 2 * PAGE) == [alone]  # watched or not
    tight = make_engine(make_decoder(num_pages=8), chunk=7, max_batch=4, max_model_len=4 * PAGE)
    watches = [PictureWatch(layers) for _ in range(2)]
    requests = [*request, (PROMPT, CASES["pai"], llava[2]), *request, (TEXT, None, None)]
    answers = ask(tight, requests, 2 * PAGE, watches=[watches[0], None, watches[1], None])
    assert answers[0] == answers[2]
    for one in watches:
        torch.testing.assert_close(one.maps, watch.maps, rtol=1e-4, atol=1e-6)


def test_prompts_that_cannot_be_watched_are_refused(make_decoder, make_engine, llava):
    engine = make_engine(make_decoder())
    with pytest.raises(ValueError, match="needs a picture"):
        ask(engine, [(TEXT, None, None)], watches=[PictureWatch()])
    with pytest.raises(ValueError, match=r"layers \[5\] cannot be watched"):
        ask(engine, [(PROMPT, None, llava[2])], watches=[PictureWatch((5,))])


def test_dimensions_of_sinks_are_found(make_decoder):
    steerer = make_decoder().steerer
    with pytest.raises(ValueError, match="no hidden dimension of this model"):
        steerer.check(Steering(var=VARConfig(tau=7.9, first_layer=0)), PromptPictures(PLACES, torch.zeros(18, 64)))
    assert steerer._first_tokens.shape == (8, 3, 64)  # the layers 0 to 2 of three


@pytest.mark.parametrize(
    ("steering", "eyes", "text"),
    [
        (Steering(act=ACTConfig(layers=(5,))), True, "the model has 0..2"),
        (Steering(var=VAR), False, "'var' is not supported by this model; it supports 'act'"),
        (Steering(pai=PAIConfig()), True, "needs a picture"),
    ],
)
def test_what_cannot_be_steered_is_refused(make_decoder, make_engine, steering, eyes, text):
    decoder = make_decoder()
    if not eyes:
        decoder.behind_pictures = None
    engine = make_engine(decoder)
    with pytest.raises(ValueError, match=text):
        ask(engine, [(TEXT, steering, None)])


def test_steering_beside_layer_reuse_is_refused_with_the_reason(make_decoder, make_engine):
    decoder = make_decoder()
    engine = make_engine(decoder)
    decoder.reuse = object()  # what it does is of no matter: the request never gets there
    with pytest.raises(ValueError, match="steering does not work beside layer reuse: its layers attend to a part"):
        ask(engine, [(TEXT, Steering(act=ACT), None)])


def test_settings_that_a_server_cannot_follow_are_refused():
    for wanted, text in [
        ({"paint": {}, "pai": {}}, "give one of them"),
        ({"act": {"model_hash": "x"}}, "leave it out"),
        ({"vhr": {"reference": "lockstep"}}, "'plain'"),
        ({"paint": {"saliency": "received"}}, "only 'cls'"),
    ]:
        with pytest.raises(ValueError, match=text):
            Steering(**wanted)
    given = Steering(act=ACTConfig(heads={2: (0, 1)}), pai=PAIConfig(alpha=0.3))
    assert Steering.from_dict(given.to_dict()) == given
    assert given.names == ("act", "pai")

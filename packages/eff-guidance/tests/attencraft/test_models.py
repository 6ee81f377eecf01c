"""On whole tiny pipelines: what is trained and what is not, what is collected, saved and given back."""

import copy

import pytest
import torch
from eff_guidance.attencraft import (
    AttenCraftConfig,
    AttenCraftTrainer,
    AttentionStore,
    Concept,
    ConceptAdapter,
    Reading,
    add_words,
    apply_concepts,
    attention_js_loss,
    map_sizes,
    normalize_map,
    reader_of,
    spans,
    train_projections,
)  # fmt: skip
from eff_kernels.edit.attention import observe_attention

CONCEPTS = (Concept(token="<new1>", init_word="cat"), Concept(token="<new2>", init_word="dog", words="red ball"))
NAMES = ("sd15", "sdxl", "sd3")
# The tiny UNets attend at 8 x 8 only.
ONE_SIZE = {"cross_share": 0.5, "self_share": 0.5}


def latents():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def masks(size=8):
    found = torch.zeros(3, size, size)
    found[0, :, :3], found[1, :, 5:], found[2, :, 3:5] = 1, 1, 1
    return found


def trainer(pipe, **settings):
    return AttenCraftTrainer(
        pipe, latents(), CONCEPTS, AttenCraftConfig(**{**ONE_SIZE, "learning_rate": 1e-2, **settings}), masks=masks()
    )


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def answer(pipe, prompt="a photo of cat"):
    model = denoiser(pipe)
    arguments = reader_of(pipe, latents())(prompt).arguments
    place = "sample" if hasattr(pipe, "unet") else "hidden_states"
    return model(**{place: latents()}, timestep=torch.tensor([300]), return_dict=False, **arguments)[0]


@pytest.mark.parametrize("name", NAMES)
def test_one_step(whole, name):
    pipe = whole(name)
    model = denoiser(pipe)
    with torch.no_grad():
        before = answer(pipe)
    old = copy.deepcopy({n: m.state_dict() for n, m in pipe.components.items() if hasattr(m, "state_dict")})
    train = trainer(pipe)
    with torch.no_grad():
        assert torch.equal(answer(pipe), before)  # nothing is changed by being trainable
    first = {part: rows.detach().clone() for part, rows in train.words.rows.items()}
    embeddings = pipe.text_encoder.get_input_embeddings()
    table = embeddings.base.weight.clone()
    torch.testing.assert_close(first["text_encoder"][0], table[8])  # "cat"
    report = train.step()
    assert report.attention > 0
    assert report.loss == pytest.approx(report.instance + report.attention, rel=1e-5)
    # only the new rows of the embedding differ, weight decay or not
    assert torch.equal(embeddings.base.weight, table)
    assert not torch.equal(train.words.rows["text_encoder"], first["text_encoder"])
    trained = {id(p) for p in train.parameters}
    assert all(p.grad is None for m in (model, pipe.text_encoder) for p in m.parameters() if id(p) not in trained)
    assert all(
        (p.grad != 0).any() for n, p in train.layers.items() for p in [p.weight] if n.endswith(("to_k", "k_proj"))
    )
    with torch.no_grad():
        assert not torch.equal(answer(pipe), before)
    train.remove()
    train.remove()
    with torch.no_grad():
        assert torch.equal(answer(pipe), before)
    assert "<new1>" not in pipe.tokenizer.get_vocab()
    for part, state in old.items():
        now = getattr(pipe, part).state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[k], v) for k, v in state.items() if isinstance(v, torch.Tensor))


def attention_gradients(pipe, which):
    """Gradients of the attention loss alone."""
    model = denoiser(pipe)
    words = add_words(pipe, CONCEPTS)
    handle, layers = train_projections(model, which)
    reading = reader_of(pipe, latents())("a photo of <new1> and <new2>")
    places = spans(reading.tokens, CONCEPTS)
    store = AttentionStore(model, [places[0][0], places[1][0], 0], cross_size=(8, 8))
    place = "sample" if hasattr(pipe, "unet") else "hidden_states"
    with store:
        model(**{place: latents()}, timestep=torch.tensor([300]), **reading.arguments)
        attention_js_loss(normalize_map(store.cross), masks()).backward()
    return words, handle, layers


def test_where_the_gradient_of_attention_goes(whole):
    pipe = whole("sd15")
    words, _, layers = attention_gradients(pipe, ("k", "v"))
    assert (words.rows["text_encoder"].grad != 0).all(1).any()
    keys = [layer.weight.grad for name, layer in layers.items() if name.endswith("to_k")]
    assert all((g != 0).any() for g in keys)
    values = [layer.weight.grad for name, layer in layers.items() if name.endswith("to_v")]
    # values of earlier layers do get some
    assert any(g is not None and (g != 0).any() for g in values)
    frozen = [p for n, p in pipe.unet.named_parameters() if "attn2.to_k" not in n and "attn2.to_v" not in n]
    assert all(p.grad is None for p in frozen)


def test_the_attention_loss_draws_words_to_their_masks(whole):
    """Twenty steps of training with it and without, all else the same: how far maps are from their masks afterwards."""
    away = {}
    for weight in (100.0, 0.0):
        pipe = whole("sd15")
        train = trainer(pipe, attention_weight=weight, refresh=1000, train=("k",))
        for _ in range(20):
            train.step()
        reading = reader_of(pipe, latents())("a photo of <new1> and <new2>")
        places = spans(reading.tokens, CONCEPTS)
        words = [places[0][0], places[1][0], 0]
        with torch.no_grad(), AttentionStore(pipe.unet, words, cross_size=(8, 8)) as store:
            pipe.unet(latents(), torch.tensor([300]), **reading.arguments)
            away[weight] = float(attention_js_loss(normalize_map(store.cross), masks()))
    assert away[100.0] < 0.9 * away[0.0], away


def test_values_get_none_in_a_model_of_one_layer(tiny, whole):
    pipe = whole("sd3")
    pipe.register_modules(transformer=tiny.model("sd3", layers=1))
    _, _, layers = attention_gradients(pipe, ("k", "v"))
    kinds = {name.rpartition(".")[2]: layer.weight.grad for name, layer in layers.items()}
    assert (kinds["add_k_proj"] != 0).any()
    assert kinds["add_v_proj"] is None or (kinds["add_v_proj"] == 0).all()


def test_the_first_position_gives_no_gradient(whole):
    model = whole("sd15").unet
    _, layers = train_projections(model)
    layer = next(iter(layers.values()))
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, layer.weight, layer.bias))
    out.square().sum().backward()
    assert (x.grad[:, 0] == 0).all()
    assert (x.grad[:, 1:] != 0).any()
    wanted = torch.autograd.grad(
        torch.nn.functional.linear(x[:, 1:].detach(), layer.weight, layer.bias).square().sum(), layer.weight
    )[0]
    torch.testing.assert_close(layer.weight.grad, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_brute_force(whole, name):
    pipe = whole(name)
    model = denoiser(pipe)
    reading = reader_of(pipe, latents())("a photo of cat and dog")
    seen = []
    place = "sample" if hasattr(pipe, "unet") else "hidden_states"
    store = AttentionStore(model, [4, 6, 0], cross_size=(8, 8), self_size=(8, 8))
    with store, observe_attention(model, lambda call, out: seen.append(call)), torch.no_grad():
        model(**{place: latents()}, timestep=torch.tensor([300]), **reading.arguments)
    cross, own = [], []
    for call in seen:
        prob = (call.q.double() @ call.k.double().mT * call.scale).softmax(-1).mean(1)[0]
        if call.streams is not None:
            image, text = call.streams["image"], call.streams["text"]
            cross.append(prob[image, text][:, [4, 6, 0]])
            own.append(prob[image, image])
        elif call.is_cross:
            cross.append(prob[:, [4, 6, 0]])
        else:
            own.append(prob)
    wanted = torch.stack(cross).mean(0).mT.unflatten(1, (8, 8))
    torch.testing.assert_close(store.cross.double(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(store.self_attention.double(), torch.stack(own).mean(0), atol=1e-6, rtol=1e-5)
    store.clear()
    assert store.cross is None
    first = next(call.name for call in seen if call.streams is not None or call.is_cross)
    with AttentionStore(model, [4, 6, 0], cross_size=(8, 8), where=[first]) as store, torch.no_grad():
        model(**{place: latents()}, timestep=torch.tensor([300]), **reading.arguments)
    torch.testing.assert_close(store.cross.double(), cross[0].mT.unflatten(1, (8, 8)), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="fits"), AttentionStore(model, [4], cross_size=(8, 8), where=["nothing"]):
        pass
    assert not any("forward" in vars(m) for m in model.modules())


def test_store_looks_at_one_sample(whole):
    pipe = whole("sd15")
    reading = reader_of(pipe, latents())("a photo of cat and dog")
    found = []
    text = reading.arguments["encoder_hidden_states"]
    other = torch.randn(1, 4, 16, 16)
    for batch, words, sample in (
        (latents(), text, 0), (torch.cat([other, latents()]), torch.cat([text.flip(1), text]), 1),
    ):  # fmt: skip
        with AttentionStore(pipe.unet, [4, 0], cross_size=(8, 8), self_size=(8, 8), sample=sample) as store:
            pipe.unet(batch, 300, encoder_hidden_states=words)
        found.append(store)
    torch.testing.assert_close(found[0].cross, found[1].cross)
    torch.testing.assert_close(found[0].self_attention, found[1].self_attention)
    assert found[0].cross.requires_grad
    assert not found[0].self_attention.requires_grad
    with pytest.raises(ValueError, match="nothing would be collected"):
        AttentionStore(pipe.unet, None, cross_size=(8, 8))
    with pytest.raises(RuntimeError, match="entered already"), store, store:
        pass
    store.remove()


def test_checkpointing_collects_once(whole):
    pipe = whole("sd15")
    found = []
    for checkpointing in (False, True):
        words, handle, layers = None, None, None
        pipe.unet.train()
        (pipe.unet.enable_gradient_checkpointing if checkpointing else pipe.unet.disable_gradient_checkpointing)()
        words, handle, layers = attention_gradients(pipe, ("k",))
        found.append([layer.weight.grad.clone() for layer in layers.values()])
        handle.remove()
        words.remove()
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_trains_under_checkpointing(whole):
    found = []
    for checkpointing in (False, True):
        pipe = whole("sd15")
        pipe.unet.train()
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        train = trainer(pipe, steps=2)
        found.append(train.fit().weights)
        assert not any("forward" in vars(m) for m in pipe.unet.modules())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(whole, name, tmp_path):
    pipe = whole(name)
    train = trainer(pipe, steps=3, sampling="reweighted")
    adapter = train.fit()
    prompt = "a photo of <new1> and <new2>"
    with torch.no_grad():
        wanted = answer(pipe, prompt)
    size = sum(layer.weight.numel() for layer in train.layers.values())
    assert adapter.num_numbers == size + sum(r.numel() for r in train.words.rows.values())
    adapter.save(tmp_path)
    train.remove()
    loaded = ConceptAdapter.load(tmp_path)
    assert loaded.concepts == CONCEPTS
    fresh = whole(name)
    with torch.no_grad():
        plain = answer(fresh)
        handle = apply_concepts(fresh, loaded)
        assert torch.equal(answer(fresh, prompt), wanted)
        twin = copy.deepcopy(denoiser(fresh))
        handle.remove()
        assert torch.equal(answer(fresh), plain)
        assert twin.state_dict().keys() == denoiser(fresh).state_dict().keys()
    if name == "sd15":
        wrong = whole("sd3")
        with pytest.raises(ValueError, match="the adapter"):
            apply_concepts(wrong, loaded)
        assert "<new1>" not in wrong.tokenizer.get_vocab()


def test_diffusers_reads_the_folder(whole, tmp_path):
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    pipe = whole("sd15")
    train = trainer(pipe, steps=2)
    adapter = train.fit()
    adapter.save(tmp_path)
    prompt = "a photo of <new1> and <new2>"
    with torch.no_grad():
        wanted = answer(pipe, prompt)
    train.remove()
    fresh = whole("sd15")
    # without _pipeline, diffusers reads the file and sets nothing
    fresh.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=fresh)
    kinds = [type(p) for p in fresh.unet.attn_processors.values()]
    assert all(k is CustomDiffusionAttnProcessor for k in kinds)
    words = add_words(fresh, CONCEPTS)
    words.rows["text_encoder"].data.copy_(adapter.words["text_encoder"])
    with torch.no_grad():
        torch.testing.assert_close(answer(fresh, prompt), wanted, atol=1e-5, rtol=1e-4)


def test_prior_pictures_and_resume_of_masks(whole):
    pipe = whole("sd15")
    prior = [(torch.randn(1, 4, 16, 16), "a photo of ball")]
    train = AttenCraftTrainer(
        pipe, latents(), CONCEPTS, AttenCraftConfig(**ONE_SIZE, prior_weight=2.0), masks=masks(), prior=prior
    )
    report = train.step()
    assert report.prior > 0
    assert report.loss == pytest.approx(report.instance + 2 * report.prior + report.attention, rel=1e-5)
    assert not report.refreshed
    assert torch.equal(train.masks, masks())


def test_v_prediction(whole):
    pipe = whole("sd15")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert trainer(pipe).step().instance > 0
    pipe = whole("sd15")
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        trainer(pipe)


def test_words_and_spans(whole):
    pipe = whole("sd15")
    with pytest.raises(ValueError, match="pieces"):
        add_words(pipe, [Concept(token="<n>", init_word="cat dog")])
    with pytest.raises(ValueError, match="already"):
        add_words(pipe, [Concept(token="cat", init_word="dog")])
    handle = add_words(pipe, CONCEPTS)
    tokens = reader_of(pipe, latents())("a photo of <new2> red ball and <new1>").tokens
    assert spans(tokens, CONCEPTS) == {0: [8], 1: [4, 5, 6]}
    assert tokens[8] == "<new1>"
    handle.remove()
    assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding
    with pytest.raises(ValueError, match="none of"):
        spans(tokens[:3], CONCEPTS)


def test_what_is_refused(whole, tiny):
    pipe = whole("sd15")
    with pytest.raises(ValueError, match="for 2 concepts and the background"):
        AttenCraftTrainer(pipe, latents(), CONCEPTS, masks=masks()[:2])
    assert "<new1>" not in pipe.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="not give whole sides"):
        map_sizes(pipe.unet, torch.zeros(1, 4, 15, 15), 0.25, 0.5)
    train = AttenCraftTrainer(pipe, latents(), CONCEPTS, masks=torch.rand(3, 16, 16))  # its cross maps: 4 x 4
    with pytest.raises(ValueError, match="no attention of"):
        train.step()
    train.remove()
    train = AttenCraftTrainer(
        pipe, latents(), CONCEPTS, AttenCraftConfig(**ONE_SIZE), masks=masks(),
        reader=lambda prompt: Reading({"encoder_hidden_states": torch.zeros(1, 5, 32)}, ("a",) * 5),
    )  # fmt: skip
    with pytest.raises(ValueError, match="none of"):
        train.step()
    with pytest.raises(ValueError, match="no reader for FluxPipeline"):
        reader_of(tiny.pipeline("flux"), latents())
    with pytest.raises(ValueError, match="no text encoder"):
        add_words(tiny.pipeline("flux"), CONCEPTS)

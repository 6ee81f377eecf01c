"""Style attention in UNets and transformers."""

import copy
import hashlib
import pickle
import threading

import pytest
import torch
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention
from eff_guidance.pokefusion import use as use_module

MODELS = ("sd15", "sdxl", "sd3", "sd3.5", "flux")


@torch.no_grad()
def run(model, tiny, *, count=2, **more):
    return model(**tiny.inputs(model, count=count, **more)).sample


def call_pipe(pipe, tiny, *, steps=2, count=1, scale=3.0, seed=0, **more):
    return pipe(
        **tiny.prompts(pipe, count=count), height=64, width=64, num_inference_steps=steps, output_type="latent",
        guidance_scale=scale, generator=torch.Generator().manual_seed(seed), **more,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_in_pipelines(tiny, styled, name):
    pipe = tiny.pipeline(name)
    before = call_pipe(pipe, tiny)
    handle = styled(pipe, num_styles=2)
    rows = []
    handle.adapter.style.register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    with handle.use():
        one = call_pipe(pipe, tiny)
    with handle.use([0, 1]):
        two = call_pipe(pipe, tiny, count=2)
    assert not torch.equal(one, before)
    assert two.shape[0] == 2
    assert torch.equal(call_pipe(pipe, tiny), before)
    assert max(rows) == 2
    with handle.use(steps=(0.0, 0.0)):
        assert torch.equal(call_pipe(pipe, tiny), before)
    with pytest.raises(ValueError, match="3 styles for 2 rows"), handle.use([0, 1, 0]):
        call_pipe(pipe, tiny, count=2)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_window_of_half_the_steps(tiny, styled, name, monkeypatch):
    pipe = tiny.pipeline(name)
    handle = styled(pipe)
    calls = []
    monkeypatch.setattr(
        "eff_guidance.pokefusion.rule.style_attention",
        lambda *a, **k: calls.append(a[1]) or use_module.style_attention(*a, **k),
    )
    with handle.use(steps=(0.0, 0.5)):
        call_pipe(pipe, tiny, steps=10)
    assert len(calls) == 5 * len(handle.adapter.names)


@torch.no_grad()
def test_mask_of_an_oblong_picture():
    mask = torch.zeros(32, 96)
    mask[:, 48:] = 1
    found = use_module.mask_on_tokens(mask, 4 * 12).reshape(4, 12)
    assert torch.equal(found[:, :6], torch.zeros(4, 6))
    assert torch.equal(found[:, 6:], torch.ones(4, 6))


def test_text_modulated(tiny, styled):
    model = tiny.model("sd3")
    handle = styled(model, text_modulated=True)
    with handle.use() as use:
        both = run(model, tiny)
        assert use.kept == {}
    given = tiny.inputs(model, count=2)
    assert handle.adapter.style.to_text["k"].in_features == given["encoder_hidden_states"].shape[-1]
    tokens = [handle.adapter.style(torch.ones(1, 1), t[None]) for t in given["encoder_hidden_states"]]
    assert not torch.allclose(*tokens)
    with torch.no_grad(), handle.use():
        one = model(**{k: v[1:] for k, v in given.items()}).sample
    assert torch.allclose(both[1:], one, atol=1e-5)
    with pytest.raises(ValueError, match="none was given"):
        handle.adapter.style(torch.ones(1, 1))


def test_norm_of_tokens(styled, tiny):
    handle = styled(tiny.model("sd15"))
    handle.fit_token_norm(3 * torch.nn.functional.normalize(torch.randn(2, 5, 32), dim=-1))
    norms = handle.adapter.style(torch.ones(1, 1)).norm(dim=-1)
    assert torch.allclose(norms, torch.full_like(norms, 3.0), atol=0.01)


# --- company --------------------------------------------------------------------------------------------------------


def with_picture_adapter(model):
    """Processors of an IP-Adapter, at scale 0."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(5)
    chosen = {}
    for name, processor in model.attn_processors.items():
        module = model.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            chosen[name] = IPAdapterAttnProcessor2_0(module.to_q.in_features, 32, num_tokens=(4,), scale=0.0)
        else:
            chosen[name] = processor
    model.set_attn_processor(chosen)


@pytest.mark.parametrize("first", ["style", "pictures"])
def test_with_a_picture_adapter(tiny, styled, first):
    model = tiny.model("sd15")
    handle = styled(model)
    with handle.use():
        wanted = run(model, tiny)
    before = run(model, tiny)
    if first == "pictures":
        handle.remove()
        with_picture_adapter(model)
        handle = styled(model)
    else:
        with_picture_adapter(model)
    given = tiny.inputs(model, count=2)
    given["encoder_hidden_states"] = (given["encoder_hidden_states"], [torch.randn(2, 1, 4, 32)])
    processors = dict(model.attn_processors)

    @torch.no_grad()
    def out():
        # UNet2DConditionModel makes this tuple itself from image_embeds; its blocks get it as it is.
        original = model.process_encoder_hidden_states
        model.process_encoder_hidden_states = lambda encoder_hidden_states, **_: encoder_hidden_states
        try:
            return model(**given).sample
        finally:
            model.process_encoder_hidden_states = original

    assert torch.allclose(out(), before, atol=1e-6)
    with handle.use():
        assert torch.allclose(out(), wanted, atol=1e-5)
    handle.remove()
    assert torch.allclose(out(), before, atol=1e-6)
    assert all(model.attn_processors[n] is p for n, p in processors.items())


def test_with_a_lora_on_keys(tiny, styled):
    peft = pytest.importorskip("peft")
    model = tiny.model("sd15")
    handle = styled(model)
    with handle.use():
        wanted = run(model, tiny)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=True))
    with handle.use():
        assert torch.allclose(run(model, tiny), wanted, atol=1e-6)
    handle.remove()
    again = styled(model)
    with again.use():
        assert torch.allclose(run(model, tiny), wanted, atol=1e-5)


def test_fused_projections(tiny, styled):
    model = tiny.model("sd15")
    handle = styled(model)
    with handle.use():
        wanted = run(model, tiny)
    model.fuse_qkv_projections()
    with handle.use():
        assert torch.allclose(run(model, tiny), wanted, atol=1e-5)


def test_weights_kept_in_eight_bits(tiny, styled):
    model = tiny.model("sd15")
    wanted_handle = styled(model)
    with wanted_handle.use():
        wanted = run(model, tiny)
    wanted_handle.remove()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    handle = styled(model)
    with handle.use():
        got = run(model, tiny)
    assert ((got - wanted).norm() / wanted.norm()) < 0.2


def test_copies_pickles_and_threads(tiny, styled):
    model = tiny.model("sd3")
    before = run(model, tiny)
    handle = styled(model, num_styles=2)
    with handle.use(1):
        wanted = run(model, tiny)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(torch.equal(run(twin, tiny), wanted) for twin in twins)
    found = {}

    def work(i):
        if i == 2:
            found[i] = run(model, tiny)
            return
        with handle.use(i):
            found[i] = run(model, tiny)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(found[1], wanted)
    assert torch.equal(found[2], before)
    assert not torch.equal(found[0], wanted)
    handle.remove()
    with handle.use(1):
        assert torch.equal(run(model, tiny), before)
        assert torch.equal(run(twins[0], tiny), wanted)


def test_compiles_in_one_graph(tiny, styled):
    model = tiny.model("sd3", layers=1)
    handle = styled(model)
    with handle.use():
        wanted = run(model, tiny)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            got = compiled(**tiny.inputs(model, count=2)).sample
    assert torch.allclose(got, wanted, atol=1e-6)


def test_autocast(tiny, styled):
    model = tiny.model("sd3")
    handle = styled(model)
    with handle.use():
        wanted = run(model, tiny)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(model, tiny)
    assert ((got - wanted).norm() / wanted.norm()) < 0.05


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refusals(tiny, styled):
    model = tiny.model("sd15")
    handle = styled(model, num_styles=2)
    with pytest.raises(ValueError, match="has a style adapter already"):
        add_style_attention(model)
    for options, words in (
        ({"style_ids": 2}, "styles 0 to 1"),
        ({"style_ids": 0, "weights": [1, 0]}, "not both"),
        ({"weights": [-1.0, 2.0]}, "none below 0"),
        ({"layer_strength": {"down_blocks": 1.0}}, "layer_strength names 'down_blocks'"),
        ({"steps": (0.0, 0.5)}, "need the pipeline"),
        ({"steps": (0.5, 0.2)}, "0 <= start <= stop"),
        ({"mask": torch.ones(2, 2, 2)}, r"mask must be a tensor \[H, W\]"),
    ):
        with pytest.raises(ValueError, match=words), handle.use(**options):
            pass
    with pytest.raises(TypeError, match="whole numbers"), handle.use(0.5):
        pass
    with pytest.raises(ValueError, match="tokens_per_style=0"):
        StyleAttentionConfig(tokens_per_style=0)
    config = StyleAttentionConfig(layers=("a", "b"), num_styles=3)
    assert StyleAttentionConfig.from_dict(config.to_dict()) == config


def test_weights_are_scaled_with_a_warning(tiny, styled, caplog):
    handle = styled(tiny.model("sd15"), num_styles=2)
    with handle.use(weights=[1.0, 3.0]) as use:
        assert use.weights.tolist() == [[0.25, 0.75]]
    assert "scaled to 1" in caplog.text


def test_base_is_untouched_by_training(tiny, styled):
    """Fifty steps: the base keeps its bytes, the adapter learns; at gate 0 only gates get a gradient."""
    pipe = tiny.pipeline("sd15")
    handle = styled(pipe, gate=0.0)

    def digest():
        hashed = hashlib.sha256()
        for value in pipe.unet.state_dict().values():
            hashed.update(value.numpy().tobytes())
        return hashed.hexdigest()

    before = digest()
    draw = torch.Generator().manual_seed(0)

    def loss():
        latents, noise = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
        t = torch.randint(0, 1000, (2,), generator=draw)
        return handle.train_step(latents, noise, t, torch.randn(2, 6, 32, generator=draw))

    loss().backward()
    moved = {n for n, p in handle.adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {n for n, _ in handle.adapter.named_parameters() if n.endswith(".gate")}
    with torch.no_grad():
        for p in handle.parameters():
            if p.dim() == 0:
                p.fill_(0.01)
    loss().backward()
    assert all(p.grad.abs().sum() > 0 for p in handle.parameters())
    optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=1e-3)
    start = {n: p.detach().clone() for n, p in handle.adapter.named_parameters()}
    for _ in range(50):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert digest() == before
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert all(not torch.equal(p, start[n]) for n, p in handle.adapter.named_parameters())

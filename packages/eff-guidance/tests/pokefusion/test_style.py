"""Style attention in UNets and transformers."""

import pytest
import torch
from eff_guidance.pokefusion import StyleAttentionConfig, add_style_attention, style_layers
from eff_guidance.pokefusion import use as use_module
from eff_kernels.edit.attention import observe_attention

MODELS = ("sd15", "sdxl", "sd3", "sd3.5", "flux")


@torch.no_grad()
def run(model, tiny, *, count=2, **more):
    return model(**tiny.inputs(model, count=count, **more)).sample


# --- what changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_fresh_unused_silent_and_removed_are_bit_identical(tiny, styled, name):
    model = tiny.model(name)
    before = run(model, tiny)
    flags = [p.requires_grad for p in model.parameters()]
    handle = add_style_attention(model, StyleAttentionConfig(style_dim=16))
    with handle.use():
        assert torch.equal(run(model, tiny), before)  # gates are 0
    handle.remove()
    handle = styled(model)
    assert torch.equal(run(model, tiny), before)
    with handle.use(strength=0.0):
        assert torch.equal(run(model, tiny), before)
    with handle.use():
        assert not torch.equal(run(model, tiny), before)
    handle.remove()
    handle.remove()
    assert torch.equal(run(model, tiny), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("kind", ["eager", "sliced"])
def test_other_processors(tiny, styled, eager, kind):
    """Eager and sliced attention without style is as before; with style it is that of the fused kernel."""
    model = tiny.model("sd15")
    handle = styled(model)
    with handle.use():
        wanted = run(model, tiny)
    handle.remove()
    before = run(eager(model, kind), tiny)
    handle = styled(model)
    processors = dict(model.attn_processors)
    assert torch.equal(run(model, tiny), before)
    with handle.use(strength=0.0):
        assert torch.equal(run(model, tiny), before)
    with handle.use():
        got = run(model, tiny)
    assert (got - wanted).abs().max() < 1e-5
    assert (got - before).abs().max() > 1e-4
    assert all(model.attn_processors[n] is p for n, p in processors.items())
    handle.remove()
    assert torch.equal(run(model, tiny), before)


def test_without_strength_style_is_not_computed(tiny, styled, monkeypatch):
    model = tiny.model("sd15")
    handle = styled(model)
    calls = []
    monkeypatch.setattr(
        "eff_guidance.pokefusion.rule.style_attention",
        lambda *a, **k: calls.append(a[1]) or use_module.style_attention(*a, **k),
    )
    with handle.use(strength=0.0):
        run(model, tiny)
    assert calls == []
    with handle.use():
        run(model, tiny)
    assert calls == list(handle.adapter.names)


# --- the formula ----------------------------------------------------------------------------------------------------


def outputs(model, tiny, handle, name, **use):
    """Attention outputs [B, H, S, D] of one layer in float64, before its output projection, and the call."""
    seen = []
    given = {
        k: v.double() if v.is_floating_point() else v
        for k, v in tiny.inputs(model, count=2).items()
        if torch.is_tensor(v)
    }
    if "added_cond_kwargs" in tiny.inputs(model):
        given["added_cond_kwargs"] = {
            k: v.double() for k, v in tiny.inputs(model, count=2)["added_cond_kwargs"].items()
        }
    look = observe_attention(model, lambda call, out: seen.append((call, out.out)), where=[name])
    with look, torch.no_grad(), handle.use(**use):
        model(**given)
    return seen[0]


def unrotated(call):
    rotary = call.extra.get("image_rotary_emb")
    if rotary is None:
        return call.q
    cos, sin = (t.double() for t in rotary)
    x, y = call.q[..., 0::2], call.q[..., 1::2]
    c, s = cos[:, 0::2], sin[:, 0::2]
    return torch.stack([x * c + y * s, y * c - x * s], -1).flatten(-2)


def style_by_hand(handle, name, call, weights):
    """Queries, keys and values of style for one layer."""
    adapter, layer = handle.adapter, handle.adapter.layer(name)
    latents = torch.einsum("bk,kmd->bmd", weights.double(), adapter.style.table)
    x = adapter.style.proj(latents)
    tokens = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    heads = call.q.shape[1]
    key, value = (
        (tokens @ w.weight.T).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (layer.to_k_style, layer.to_v_style)
    )
    module = call.module
    norm = module.norm_added_k if hasattr(module, "add_k_proj") and module.added_kv_proj_dim else module.norm_k
    return unrotated(call), key if norm is None else norm(key), value


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_two_softmaxes_by_hand(tiny, styled, name):
    model = tiny.model(name).double()
    handle = styled(model, num_styles=2)
    handle.adapter.double()
    layer = handle.adapter.names[-1]
    weights = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    call, got = outputs(model, tiny, handle, layer, weights=weights, strength=0.7)
    q, key, value = style_by_hand(handle, layer, call, weights)
    image = slice(None) if call.streams is None else call.streams["image"]
    want = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
    own = (q[:, :, image] @ key.mT * q.shape[-1] ** -0.5).softmax(-1) @ value
    want[:, :, image] += 0.7 * torch.tanh(torch.tensor(0.5).double()) * own
    # FLUX rotates in float32 whatever it is given.
    assert (got - want).abs().max() < (1e-6 if name == "flux" else 1e-12)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@torch.no_grad()
def test_joint_softmax_by_hand(tiny, styled, name):
    model = tiny.model(name).double()
    handle = styled(model, fusion="joint", gate=20.0)  # tanh(20) is 1 in float64, to 1e-16
    handle.adapter.double()
    layer = handle.adapter.names[-1]
    call, got = outputs(model, tiny, handle, layer)
    q, key, value = style_by_hand(handle, layer, call, torch.ones(1, 1))
    image = slice(None) if call.streams is None else call.streams["image"]
    key, value = (t.expand(2, -1, -1, -1) for t in (key, value))
    want = (call.q @ call.k.mT * call.scale).softmax(-1) @ call.v
    weights = (q[:, :, image] @ torch.cat([call.k, key], 2).mT * call.scale).softmax(-1)
    want[:, :, image] = weights @ torch.cat([call.v, value], 2)
    assert (got - want).abs().max() < 1e-12


@torch.no_grad()
def test_one_token_adds_its_value_everywhere(tiny, styled):
    model = tiny.model("sd15").double()
    handle = styled(model, tokens_per_style=1)
    handle.adapter.double()
    layer = handle.adapter.names[0]
    call, full = outputs(model, tiny, handle, layer, strength=0.4)
    _, none = outputs(model, tiny, handle, layer, strength=0.0)
    _, _, value = style_by_hand(handle, layer, call, torch.ones(1, 1))
    assert (full - none - 0.4 * torch.tanh(torch.tensor(0.5).double()) * value).abs().max() < 1e-12


@torch.no_grad()
def test_affine_in_strength(tiny, styled):
    model = tiny.model("sdxl").double()
    handle = styled(model)
    handle.adapter.double()
    layer = handle.adapter.names[0]  # later ones get other queries
    none, half, full = (outputs(model, tiny, handle, layer, strength=s)[1] for s in (0.0, 0.5, 1.0))
    assert (full - none - 2 * (half - none)).abs().max() < 1e-10
    assert (full - none).abs().max() > 1e-3
    damped = outputs(model, tiny, handle, layer, layer_strength={layer.rpartition(".")[0]: 0.5})[1]
    assert torch.equal(damped, half)


# --- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_only_the_decoder_s_cross_attention(tiny, styled, name):
    model = tiny.model(name)
    processors = dict(model.attn_processors)
    forwards = {n for n, m in model.named_modules() if "forward" in vars(m)}
    handle = styled(model)
    assert all(n.startswith("up_blocks.") and n.endswith(".attn2") for n in handle.adapter.names)
    touched = {n for n, m in model.named_modules() if "forward" in vars(m)} - forwards
    assert touched == {"", *handle.adapter.names}
    assert all(model.attn_processors[n] is p for n, p in processors.items())


def test_sd15_has_nine_layers_of_ten_million():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        handle = add_style_attention(model)
        assert len(handle.adapter.names) == 9
        assert sum(p.numel() for n, p in handle.adapter.named_parameters() if "_style" in n) == 10_321_920
        assert len(style_layers(model, "all")) == 16
        every = add_style_attention(UNet2DConditionModel(cross_attention_dim=768), StyleAttentionConfig(layers="all"))
        assert sum(p.numel() for n, p in every.adapter.named_parameters() if "_style" in n) == 19_169_280
        assert handle.adapter.style(torch.ones(1, 1)).shape == (1, 8, 768)


def test_layers_by_name(tiny):
    sd3, flux, unet = tiny.model("sd3.5"), tiny.model("flux"), tiny.model("sdxl")
    assert list(style_layers(sd3, "decoder")) == ["transformer_blocks.1.attn", "transformer_blocks.2.attn"]
    assert list(style_layers(flux, "decoder")) == ["transformer_blocks.1.attn"]
    assert list(style_layers(flux, "all")) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    assert list(style_layers(sd3, ("transformer_blocks.0", "*.2.attn"))) == [
        "transformer_blocks.0.attn", "transformer_blocks.2.attn",
    ]  # fmt: skip
    assert all(n.startswith("up_blocks.0.attentions.1.") for n in style_layers(unet, "style_block"))
    with pytest.raises(ValueError, match=r"has no up_blocks\.0\.attentions\.1"):
        style_layers(sd3, "style_block")
    with pytest.raises(ValueError, match=r"layers='up_blocks.7' fits none"):
        style_layers(unet, ("up_blocks.7",))
    with pytest.raises(ValueError, match="no cross-attention"):
        style_layers(torch.nn.Linear(2, 2), "all")


def test_transformers_with_cross_attention(tiny, styled):
    from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel

    torch.manual_seed(0)
    models = [
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            cross_attention_dim=16, caption_channels=12, patch_size=2, use_additional_conditions=False,
        ),
        SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, patch_size=1,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
            sample_size=8,
        ),
    ]  # fmt: skip
    for model in models:
        model.eval()
        given = {
            "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 12),
            "timestep": torch.full((2,), 400),
        }  # fmt: skip
        if isinstance(model, PixArtTransformer2DModel):
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        with torch.no_grad():
            before = model(**given).sample
            handle = styled(model)
            assert list(handle.adapter.names) == ["transformer_blocks.1.attn2"]
            with handle.use():
                assert not torch.equal(model(**given).sample, before)
            assert torch.equal(model(**given).sample, before)


# --- styles, rows, caches, masks, steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_tokens_have_no_order_and_rows_are_alone(tiny, styled, name):
    model = tiny.model(name).double()
    handle = styled(model, num_styles=3)
    handle.adapter.double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs(model, count=2).items()}

    @torch.no_grad()
    def out(rows=slice(None), **use):
        with handle.use(**use):
            return model(**{k: v[rows] for k, v in given.items()}).sample

    first = out(style_ids=1)
    assert torch.equal(out(weights=[0.0, 1.0, 0.0]), first)
    both = out(style_ids=[0, 2])
    for i, style in enumerate((0, 2)):
        assert (both[i : i + 1] - out(slice(i, i + 1), style_ids=style)).abs().max() < 1e-12
    assert (both[1] - first[1]).abs().max() > 1e-6
    assert torch.equal(out(style_ids=[1, 1], keep=torch.tensor([True, False]))[1], out(strength=0.0)[1])
    with torch.no_grad():
        handle.adapter.style.table.copy_(handle.adapter.style.table.flip(1))
    assert (out(style_ids=1) - first).abs().max() < 1e-12


def test_kept_keys_and_values(tiny, styled):
    model = tiny.model("sd15")
    handle = styled(model, num_styles=2)
    made = []
    handle.adapter.style.register_forward_hook(lambda *_: made.append(1))
    layers = len(handle.adapter.names)
    with handle.use(cache=False):
        plain = [run(model, tiny, seed=s) for s in (0, 1)]
    assert len(made) == 2 * layers
    with handle.use() as use:
        kept = [run(model, tiny, seed=s) for s in (0, 1)]
        assert len(made) == 3 * layers
        assert len(use.kept) == layers
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
        with torch.no_grad():
            handle.adapter.style.table.mul_(-1)  # other weights
        changed = run(model, tiny)
        assert len(made) == 4 * layers
        assert not torch.equal(changed, plain[0])
        model.double()  # another dtype
        with torch.no_grad():
            model(**{k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs(model, count=2).items()})
        assert len(made) == 5 * layers
        model.float()
    with handle.use(1):  # another style
        assert not torch.equal(run(model, tiny), changed)
        handle.adapter.bfloat16()
        run(model, tiny)
        assert len(made) == 7 * layers


def test_unconditional_rows_get_no_style(tiny, styled):
    model = tiny.model("sd15")
    before = run(model, tiny)
    handle = styled(model)
    with handle.use(unconditional=1):
        after = run(model, tiny)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_mask(tiny, styled):
    model = tiny.model("sd15").double()
    handle = styled(model)
    handle.adapter.double()
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    layer = handle.adapter.names[0]
    _, none = outputs(model, tiny, handle, layer, strength=0.0)
    _, full = outputs(model, tiny, handle, layer)
    _, half = outputs(model, tiny, handle, layer, mask=mask)
    side = round(none.shape[2] ** 0.5)
    none, full, half = (t.unflatten(2, (side, side)) for t in (none, full, half))
    assert torch.equal(half[:, :, :, : side // 2], none[:, :, :, : side // 2])
    assert (half[:, :, :, side // 2 :] - full[:, :, :, side // 2 :]).abs().max() < 1e-12
    assert not torch.equal(half, none)
    with pytest.raises(ValueError, match="does not fit a layer"), handle.use(mask=torch.ones(64, 40)):
        run(model.float(), tiny)

"""Maps captured from tiny transformers beside a joint attention built by brute force from the same queries and keys."""

import threading

import pytest
import torch
from eff_guidance.refam import capture_joint_attention, default_blocks
from eff_kernels.edit.attention import joint_attention, observe_attention

VALID = torch.tensor([True] * 4 + [False] * 2)


def mochi():
    from diffusers import MochiTransformer3DModel

    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=8, attention_head_dim=8, num_layers=3, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4,
    ).eval()  # fmt: skip
    mask = VALID.repeat(2, 1)
    mask[1, 3] = False
    return model, {
        "hidden_states": torch.randn(2, 4, 1, 8, 12), "encoder_hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([500.0, 500.0]), "encoder_attention_mask": mask,
    }, mask  # fmt: skip


def case(tiny, name):
    if name == "mochi":
        return mochi()
    model = tiny.model(name)
    return model, tiny.inputs(model, count=2, side=4), VALID.repeat(2, 1)


def brute(call, valid, normalize, direction):
    """Maps [B, N, T] from whole attention matrices in float64."""
    image, text = call.streams["image"], call.streams["text"]
    logits = call.q.double() @ call.k.double().mT * call.scale
    if normalize == "joint":
        prob = logits.softmax(-1)
        maps = prob[:, :, image, text] if direction == "image_to_text" else prob[:, :, text, image].mT
    elif direction == "image_to_text":
        maps = logits[:, :, image, text].masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    else:
        maps = logits[:, :, text, image].softmax(-1).mT
    return maps.mean(1) * valid[:, None]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux", "mochi"])
@torch.no_grad()
def test_bit_identical_and_equal_to_brute_force(tiny, name):
    model, given, valid = case(tiny, name)
    before = model(**given).sample
    processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    names = joint_attention(model)
    calls = {}
    with observe_attention(model, lambda call, out: calls.setdefault(call.name, []).append(call), where=names):
        model(**given)
    for normalize in ("text", "joint"):
        for direction in ("image_to_text", "text_to_image"):
            with capture_joint_attention(model, names, valid=valid, normalize=normalize, direction=direction) as seen:
                assert torch.equal(model(**given).sample, before)
            assert list(seen.maps) == names
            for n in names:
                if name == "mochi":
                    wanted = torch.zeros_like(seen.maps[n], dtype=torch.float64)
                    for b, call in enumerate(calls[n]):
                        own = torch.ones(1, int(valid[b].sum()), dtype=torch.bool)
                        wanted[b, :, valid[b]] = brute(call, own, normalize, direction)[0]
                else:
                    wanted = brute(calls[n][0], valid, normalize, direction)
                torch.testing.assert_close(seen.maps[n].double(), wanted, atol=1e-5, rtol=0)
                assert (seen.maps[n].mT[~valid] == 0).all()
                if normalize == "text" and direction == "image_to_text":
                    torch.testing.assert_close(seen.maps[n].sum(-1), torch.ones(2, seen.maps[n].shape[1]))
                square = seen.text_to_text[n]
                torch.testing.assert_close(square.sum(-1), valid.float())
                assert (square.mT[~valid] == 0).all()
    assert all(m.processor is processors[n] for n, m in model.named_modules() if hasattr(m, "processor"))
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_several_calls_are_averaged(tiny):
    model = tiny.model("flux")
    found = []
    for seeds in ((0,), (1,), (0, 1)):
        with capture_joint_attention(model) as seen:
            for seed in seeds:
                model(**tiny.inputs(model, side=4, seed=seed))
        found.append(seen.mean()[0])
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


@torch.no_grad()
def test_other_threads_are_not_looked_at(tiny):
    model = tiny.model("sd3")
    with capture_joint_attention(model) as seen:
        thread = threading.Thread(target=lambda: model(**tiny.inputs(model, side=4)))
        thread.start()
        thread.join()
        assert not seen.maps
        with pytest.raises(RuntimeError, match="nothing was captured"):
            seen.mean()
        with pytest.raises(RuntimeError, match="entered already"):
            seen.__enter__()


def test_blocks(tiny):
    assert default_blocks(tiny.model("sd3", layers=5)) == ("transformer_blocks.3.attn", "transformer_blocks.4.attn")
    chosen = default_blocks(tiny.model("flux", layers=3, single=4))
    assert chosen == (
        "transformer_blocks.2.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    )
    model = tiny.model("flux")
    with pytest.raises(ValueError, match=r"no block 'transformer_blocks.9'"):
        capture_joint_attention(model, ["transformer_blocks.9"])
    with pytest.raises(TypeError, match="one string"):
        capture_joint_attention(model, "transformer_blocks.0")
    with pytest.raises(ValueError, match="empty"):
        capture_joint_attention(model, [])
    with pytest.raises(ValueError, match="FluxTransformer2DModel, SD3Transformer2DModel"):
        capture_joint_attention(tiny.model("sd15"))
    with pytest.raises(ValueError, match="normalize='both'"):
        capture_joint_attention(model, normalize="both")
    with torch.no_grad(), capture_joint_attention(model, valid=VALID[:5]), pytest.raises(ValueError, match="6 tokens"):
        model(**tiny.inputs(model, side=4))


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@torch.no_grad()
def test_mochi_needs_to_know_its_padding():
    model, given, _ = mochi()
    with capture_joint_attention(model), pytest.raises(ValueError, match="which tokens are valid"):
        model(**given)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@torch.no_grad()
def test_fused_and_autocast_and_half(tiny):
    model = tiny.model("flux")
    given = tiny.inputs(model, side=4)
    with capture_joint_attention(model) as seen:
        model(**given)
    with capture_joint_attention(model) as cast, torch.autocast("cpu", torch.bfloat16):
        model(**given)
    model.fuse_qkv_projections()
    with capture_joint_attention(model) as fused:
        model(**given)
    torch.testing.assert_close(fused.mean()[0], seen.mean()[0], atol=1e-6, rtol=1e-5)
    assert cast.mean()[0].dtype == torch.float32
    torch.testing.assert_close(cast.mean()[0], seen.mean()[0], atol=0.01, rtol=0.05)

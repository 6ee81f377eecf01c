import subprocess
import sys

import pytest
import torch
from eff_attention.neighborhood import enable_dinat, na2d, register_sliding_window

NAME = "eff_sliding_window"


@pytest.fixture
def registered():
    with register_sliding_window() as handle:
        yield handle


@pytest.fixture
def model():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, sliding_window=6, max_position_embeddings=128, attn_implementation="sdpa",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def both(model, run):
    """The result of ``run`` with SDPA and with ours."""
    results = []
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(run())
    return results


def test_prompt_equals_sdpa(registered, model):
    tokens = torch.randint(0, 64, (2, 40))
    wanted, actual = both(model, lambda: model(tokens).logits)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    model.config.sliding_window = None
    assert not torch.allclose(model(tokens).logits, actual, atol=1e-3)  # the window mattered


def alternating():
    """Gemma 3: layers with a window and layers without take turns."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, sliding_window=6, max_position_embeddings=128, attn_implementation="sdpa",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_layers_with_and_without_a_window(registered, side):
    torch.manual_seed(0)
    model, ids, real = alternating(), torch.randint(1, 64, (2, 21)), torch.ones(2, 21, dtype=torch.long)
    if side:
        real[1, slice(0, 5) if side == "left" else slice(16, 21)] = 0
    wanted, got = both(model, lambda: model(ids, attention_mask=real).logits)
    torch.testing.assert_close(got[real.bool()], wanted[real.bool()], rtol=1e-4, atol=1e-5)
    if side != "right":
        run = lambda: model.generate(ids, attention_mask=real, max_new_tokens=9, do_sample=False)  # noqa: E731
        wanted, got = both(model, run)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_sdpa(registered, model, side):
    tokens, mask = torch.randint(0, 64, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, :19] = 0
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted, actual = both(model, lambda: model(tokens, attention_mask=mask, position_ids=positions).logits)
    torch.testing.assert_close(actual[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    assert actual.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_sdpa(registered, model, cache):
    tokens, mask = torch.randint(0, 64, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    options["disable_compile"] = True
    wanted, actual = both(model, lambda: model.generate(tokens, attention_mask=mask, **options))
    assert torch.equal(actual, wanted)


def test_training_equals_sdpa(registered, model):
    tokens = torch.randint(0, 64, (1, 30))
    grads = []
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_other_masks_than_the_window(registered, model):
    """Holes in the mask, and packed sequences, which restart their positions."""
    tokens, mask = torch.randint(0, 64, (1, 20)), torch.ones(1, 20, dtype=torch.long)
    mask[0, 8:10] = 0
    wanted, actual = both(model, lambda: model(tokens, attention_mask=mask).logits)
    torch.testing.assert_close(actual[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    wanted, actual = both(model, lambda: model(tokens, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_registration_is_taken_back(model):
    from transformers import AttentionInterface, AttentionMaskInterface

    with register_sliding_window("another"):
        with pytest.raises(ValueError, match="'another' is registered"):
            register_sliding_window("another")
        assert "another" in AttentionInterface._global_mapping
        assert "another" in AttentionMaskInterface._global_mapping
    assert "another" not in AttentionInterface._global_mapping
    assert "another" not in AttentionMaskInterface._global_mapping


SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "num_key_value_heads": 2, "attn_implementation": "eager",
}  # fmt: skip


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    more = {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}
    model = GptOssForCausalLM(GptOssConfig(**SIZES, **more))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(2.0)
    return model


def gemma2(window=8):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    more = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": window, "attn_logit_softcapping": 5.0}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **more))


def qwen2_moe():
    """Its layers do not hand their window on."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **SIZES, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 2, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)


def qwen2_of_one():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=1, layer_types=["sliding_attention"] * 2)
    )


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("make", [gpt_oss, gemma2, qwen2_moe, qwen2_of_one])
def test_sinks_softcaps_and_windows_are_those_of_the_host(registered, make, side):
    """Against transformers' own explicit attention, with weights large enough that each of them matters."""
    torch.manual_seed(0)
    model, ids, mask = make().eval(), torch.arange(1, 31).expand(2, -1), torch.ones(2, 30, dtype=torch.long)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(12)
    if side:
        mask[1, :9] = 0
    found, steps = [], []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask).logits[mask.bool()])
            if make is not qwen2_of_one:  # transformers' cache for windows of one token keeps all of them
                steps.append(
                    model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
                )
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()
    assert not steps or torch.equal(*steps)


def test_dropout_and_arguments_that_are_not_known(registered, model):
    model.set_attn_implementation(NAME)
    layer, x = model.model.layers[0].self_attn, torch.randn(1, 4, 12, 8)
    from eff_attention.neighborhood.sliding_window import _attention

    mask = torch.ones(1, 1, 1, 1, dtype=torch.uint8).expand(1, 1, 1, 6)
    torch.manual_seed(0)
    mean = sum(_attention(layer, x, x, x, mask, dropout=0.5)[0] for _ in range(400)) / 400
    assert (mean - _attention(layer, x, x, x, mask)[0]).abs().max() < 0.5
    with pytest.raises(NotImplementedError, match=r"does not know what \['bias_by_head'\]"):
        _attention(layer, x, x, x, mask, bias_by_head=torch.zeros(4))


def test_autocast(registered, model):
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        wanted, actual = both(model, lambda: model(tokens).logits)
    assert (wanted - actual).abs().max() < 0.05 * wanted.abs().max()


def dinat_config():
    from transformers import DinatConfig

    return DinatConfig(
        image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], kernel_size=3,
        dilations=[[1], [1]], num_labels=3, drop_path_rate=0.0,
    )  # fmt: skip


def test_dinat_runs_and_trains():
    with enable_dinat():
        from transformers import DinatForImageClassification

        model = DinatForImageClassification(dinat_config())
        out = model(torch.randn(2, 3, 32, 48), labels=torch.tensor([0, 2]), output_attentions=True)
        assert out.attentions[0].shape[-1] == 9
        out.loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters())
        assert any(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("rpb"))


def test_attention_of_dinat_is_neighborhood_attention():
    with enable_dinat():
        from transformers.models.dinat.modeling_dinat import NeighborhoodAttention

        layer = NeighborhoodAttention(dinat_config(), 16, 2, 3, 2).eval()
        x = torch.randn(1, 7, 9, 16)  # height and width differ: they must not change places
        q, k, v = (p(x).unflatten(-1, (2, 8)) for p in (layer.query, layer.key, layer.value))
        torch.testing.assert_close(layer(x)[0], na2d(q, k, v, 3, 1, 2).flatten(-2), rtol=1e-5, atol=1e-5)


def test_enable_dinat_is_taken_back():
    with enable_dinat():
        import transformers.models.dinat.modeling_dinat as module

        ours = module.natten2dav, module.requires_backends, module.NeighborhoodAttention.forward
    theirs = module.natten2dav, module.requires_backends, module.NeighborhoodAttention.forward
    assert all(a is not b for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_dinat_without_natten():
    code = """
import sys
sys.modules["natten"] = None
from eff_attention.neighborhood import enable_dinat
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "natten" else found(name, *a)
enable_dinat()
from transformers import DinatConfig, DinatModel
import torch
c = DinatConfig(patch_size=4, embed_dim=16, depths=[1], num_heads=[2], kernel_size=3, dilations=[[1]])
print(DinatModel(c)(torch.randn(1, 3, 32, 32)).last_hidden_state.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.Size" in done.stdout, done.stderr

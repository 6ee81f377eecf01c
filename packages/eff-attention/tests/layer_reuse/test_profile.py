import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, apply_layer_reuse, profile_layer_reuse, search_policy
from eff_kernels.edit.caches import cache_kwargs
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

LAYERS = 6
SIZES = LayerReuseConfig(top_k=32, block_size=8, min_seq_len=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(64, (1, 120), generator=torch.Generator().manual_seed(0))


def decode(model, tokens, prompt, mask=None, cache=None):
    """Logits of the last tokens, one step after the other."""
    cache = DynamicCache() if cache is None else cache
    found = []
    with torch.no_grad():
        for i in range(prompt, tokens.size(1) + 1):
            new = tokens[:, :prompt] if i == prompt else tokens[:, i - 1 : i]
            seen = None if mask is None else mask[:, :i]
            found.append(model(new, **cache_kwargs(model, cache), attention_mask=seen, use_cache=True).logits[:, -1])
    return torch.stack(found, 1)


def test_tied_layers_share_their_blocks(model, tokens):
    with torch.no_grad():  # layer 3 attends as layer 2 does: same input but for nothing, same weights
        model.model.layers[3].load_state_dict(model.model.layers[2].state_dict())
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    found = profile_layer_reuse(
        model, tokens, steps=16, block_size=8, top_k=32, sink_tokens=8, recent_tokens=8, sensitivity=False
    )
    assert found.overlap[:, 2, 3] == pytest.approx(1.0)
    policy = search_policy(found, theta=0.99, force_full=(0, 1), head_merge="min")
    assert policy.source[3] in (2, policy.source[2])
    assert policy.kind[3] == "reuse"


def test_a_profile_in_one_piece_is_that_of_single_steps(model, tokens):
    settings = {"block_size": 8, "top_k": 32, "sink_tokens": 8, "recent_tokens": 8, "sensitivity": False}
    whole = profile_layer_reuse(model, tokens, steps=4, **settings)
    single = [profile_layer_reuse(model, tokens[:, : 117 + t], steps=1, **settings) for t in range(4)]
    for t in range(4):
        torch.testing.assert_close(torch.tensor(whole.ratio90[t]), torch.tensor(single[t].ratio90[0]))
    mean = sum(s.overlap for s in single) / 4
    assert whole.overlap == pytest.approx(mean, abs=1e-6)


def test_sensitivity_is_that_of_one_restricted_layer(model, tokens):
    seen = []
    found = profile_layer_reuse(
        model, tokens, steps=8, block_size=8, top_k=32, sink_tokens=8, recent_tokens=8,
        progress=lambda *a: seen.append(a),
    )  # fmt: skip
    assert found.rnmse.shape == found.kl.shape == (LAYERS,)
    assert (found.rnmse > 0).all()
    assert (found.kl > -1e-6).all()
    assert seen[-1] == (2 + LAYERS, 2 + LAYERS)
    assert model.config._attn_implementation == "sdpa"


def test_errors_fall_as_theta_rises(model):
    errors = []
    for theta in (0.0, 0.8, 1.0):
        total = 0.0
        for seed in range(3):
            text = torch.randint(64, (1, 120), generator=torch.Generator().manual_seed(seed))
            found = profile_layer_reuse(
                model, text, steps=16, block_size=8, top_k=32, sink_tokens=8, recent_tokens=8, sensitivity=False
            )
            policy = search_policy(found, theta=theta, force_full=(0,))
            with apply_layer_reuse(model, policy, SIZES):
                sparse = decode(model, text, 110)
            total += (sparse - decode(model, text, 110)).norm().item()
        errors.append(total)
    assert errors[0] > errors[1] >= errors[2]


def test_heads_may_share_their_choice(model, tokens):
    found = profile_layer_reuse(
        model, tokens, steps=4, block_size=8, top_k=32, sink_tokens=8, recent_tokens=8, shared_heads=True,
        sensitivity=False,
    )  # fmt: skip
    assert found.overlap.shape == (1, LAYERS, LAYERS)
    assert found.overlap[0].diagonal() == pytest.approx(1.0)


def test_what_does_not_fit_is_named(model, tokens):
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8,
        sliding_window=16, intermediate_size=8,
    )  # fmt: skip
    settings = {"input_ids": tokens, "block_size": 8, "top_k": 32, "sink_tokens": 8, "recent_tokens": 8}
    with pytest.raises(NotImplementedError, match="whole past"):
        profile_layer_reuse(MistralForCausalLM(config), **settings)
    with pytest.raises(NotImplementedError, match="no attention implementation"):
        profile_layer_reuse(torch.nn.Linear(2, 2), **settings)
    for changes, text in (
        ({"top_k": 30}, "multiple of block_size"),
        ({"sink_tokens": 9, "recent_tokens": 24}, "no room for the 5 blocks of sink_tokens and recent_tokens"),
        ({"recent_tokens": -8}, "must not be negative"),
        ({"steps": 119}, "too short"),
        ({"input_ids": tokens[0]}, r"must be \[1, n\]"),
    ):
        with pytest.raises(ValueError, match=text):
            profile_layer_reuse(model, **{**settings, **changes})

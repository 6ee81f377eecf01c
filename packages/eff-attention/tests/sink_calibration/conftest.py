"""Tiny models with uneven attention, and attention by the formulas on whole maps to compare them with."""

import copy
import functools

import pytest
import torch
from eff_attention.sink_calibration import calibrate_attention, find_attention_sinks


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def models():
    import transformers

    made = {}
    for name in ("Llama", "Qwen2", "Gemma"):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{name}Config")(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=67, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0,
            bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
        )  # fmt: skip
        made[name] = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    return made


@pytest.fixture(params=["Llama", "Qwen2", "Gemma"])
def any_model(request):
    return copy.deepcopy(models()[request.param])


@pytest.fixture
def model():
    return copy.deepcopy(models()["Llama"])


@pytest.fixture
def ids():
    return torch.randint(1, 67, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference():
    """Logits of one sequence [1, n] whose maps are made whole and changed by the formulas, and the maps before that."""
    import transformers
    from transformers.masking_utils import eager_mask

    def run(model, ids, heads, **options):
        beta, maps = options.pop("beta", 0.4), []

        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
            weights = ((query @ key.mT * scaling + attention_mask).float()).softmax(-1)
            maps.append(weights.detach())
            some = heads.get(module.layer_idx, ())
            if some:
                sinks = find_attention_sinks(weights, **options)
                weights = calibrate_attention(weights, sinks, beta, heads=some)
            return (weights.to(value.dtype) @ value).transpose(1, 2), None

        transformers.AttentionInterface.register("sink_reference", attend)
        transformers.AttentionMaskInterface.register("sink_reference", eager_mask)
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("sink_reference")
        return twin(input_ids=ids, use_cache=False).logits, maps

    return run

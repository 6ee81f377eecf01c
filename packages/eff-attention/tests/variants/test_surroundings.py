"""Hybrids under adapters, checkpointing, autocast, and after a round trip."""

import copy
import threading

import pytest
import torch
from eff_attention.variants import (
    KINDS,
    AttentionVariantConfig,
    attention_maps,
    build_hybrid,
    load_hybrid,
    swap_layers_,
)
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames checkpointing
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
IDS = torch.arange(1, 31)[None]
STATIC = ("rnd_emb_qk", "fixed_seq_qk")


def make(kind, layout="even", seed=0, **options):
    torch.manual_seed(seed)
    more = {"fixed_ids": list(range(64))} if kind == "fixed_seq_qk" else {}
    settings = AttentionVariantConfig(kind=kind, max_len=64, qk_norm=kind == "non_approximate", **more, **options)
    return build_hybrid(LlamaConfig(**SIZES), settings, layout).eval()


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", STATIC)
def test_static_maps_follow_the_weights_whatever_changes_them(kind, use_cache):
    """Adapters on and off, autocast, and writes that no version counter sees."""
    peft = pytest.importorskip("peft")
    model = make(kind)
    wanted = logits(model, use_cache=use_cache)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, use_cache=use_cache)
    assert torch.equal(logits(model, use_cache=use_cache), wanted)
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    changed = logits(adapted, use_cache=use_cache)
    assert not torch.allclose(changed, wanted, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, use_cache=use_cache), wanted)
    assert torch.equal(logits(adapted, use_cache=use_cache), changed)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, use_cache=use_cache), changed, rtol=1e-3, atol=1e-3)
    fresh = make(kind)
    fresh.load_state_dict(merged.state_dict())
    for m in (merged, fresh):
        m.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    assert torch.equal(logits(merged, use_cache=use_cache), logits(fresh, use_cache=use_cache))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_both_kinds_of_checkpointing_give_all_gradients(kind):
    model = make(kind).train()
    found = []
    for reentrant in (None, False, True):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        if kind == "static_emb_qk" and reentrant:
            with pytest.raises(NotImplementedError, match="'use_reentrant': False"):
                model(IDS, labels=IDS)
            continue
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", STATIC)
def test_results_are_those_of_the_batch_alone(kind):
    """The row of the sequence behind the maps is in none of them."""
    model, ids = make(kind), IDS.repeat(3, 1)
    out = model(ids, use_cache=False, output_hidden_states=True, labels=ids)
    assert out.logits.shape == (3, 30, 97)
    assert {h.shape[0] for h in out.hidden_states} == {3}
    plain = model(ids, use_cache=False, return_dict=False)[0]
    torch.testing.assert_close(plain, out.logits, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, ids, use_cache=True), out.logits.detach(), rtol=0, atol=2e-5)
    maps = attention_maps(model, input_ids=ids)
    assert {i: m.shape for i, m in maps.items()} == dict.fromkeys((1, 2, 3, 4), (3, 4, 30, 30))


def test_maps_of_standard_layers_are_their_weights():
    model = make("standard")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(IDS, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    found = attention_maps(model, input_ids=IDS)
    for i, weights in enumerate(wanted, 1):
        torch.testing.assert_close(found[i], weights, rtol=1e-4, atol=1e-6)
    assert not hasattr(model.model.layers[0].self_attn, "_eff_attention")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_autocast(kind):
    model = make(kind)
    wanted = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model).float()
        first = model.generate(IDS[:, :9], max_new_tokens=3, do_sample=False)
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert first.shape == (1, 12)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_threads_do_not_meet(kind):
    model, found = make(kind), []
    prompts = [IDS[:, :20], IDS[:, 3:12]]
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = [model.generate(p, **options) for p in prompts]

    def run(i):
        found.append(torch.equal(model.generate(prompts[i], **options), wanted[i]))

    for _ in range(3):
        threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 6


def test_generation_settings_come_back(tmp_path):
    model = make("approximate")
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    assert load_hybrid(tmp_path).generation_config.eos_token_id == [7, 9]
    (tmp_path / "generation_config.json").unlink()
    assert load_hybrid(tmp_path).generation_config.eos_token_id is None


def test_layers_with_windows_are_refused_by_the_models_config():
    settings = AttentionVariantConfig(kind="approximate")
    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    with pytest.raises(ValueError, match=r"layer 1 has a window \(sliding_attention\)"):
        swap_layers_(mistral, {1: settings})
    types = ["full_attention", "sliding_attention"] * 2
    mixed = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=types))
    swap_layers_(mixed, {1: settings, 3: settings})
    with pytest.raises(ValueError, match="layer 2 has a window"):
        swap_layers_(mixed, {2: settings})
    swap_layers_(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), {1: settings})


@pytest.mark.parametrize("kind", ["rnd_emb_qk", "fixed_seq_qk", "static_emb_qk", "mlp"])
def test_what_holds_keys_and_values_can_forget_tokens(kind):
    model, options = make(kind), {"max_new_tokens": 12, "do_sample": False}
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), model.generate(ids, **options))


@pytest.mark.parametrize("kind", ["approximate", "non_approximate"])
def test_what_holds_a_state_says_so(kind):
    with pytest.raises(RuntimeError, match="a recurrent state cannot forget"):
        make(kind).generate(IDS, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_copy_of_a_cache_goes_its_own_way(kind):
    from eff_kernels.edit.caches import cache_kwargs
    from transformers import DynamicCache

    model, cache = make(kind), DynamicCache()
    with torch.no_grad():
        model(IDS, use_cache=True, **cache_kwargs(model, cache))
        twin = copy.deepcopy(cache)
        wanted = model(IDS[:, :2], use_cache=True, **cache_kwargs(model, cache)).logits
        model(IDS[:, 4:9], use_cache=True, **cache_kwargs(model, cache))
        assert torch.equal(model(IDS[:, :2], use_cache=True, **cache_kwargs(model, twin)).logits, wanted)


@pytest.mark.parametrize("kind", ["approximate", "mlp"])
def test_a_folder_is_not_taken_for_a_standard_model(kind, tmp_path):
    import pickle

    from transformers import AutoConfig, AutoModelForCausalLM

    model = make(kind)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(logits(twin), logits(model)) for twin in twins)
    twins[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention_variants_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again = load_hybrid(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_hybrid(tmp_path / "again")), logits(model))
    assert isinstance(again.config, LlamaConfig)
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "standard")
    with pytest.raises(ValueError, match="names no attention variants"):
        load_hybrid(tmp_path / "standard")
    assert AutoConfig.from_pretrained(tmp_path / "standard").model_type == "llama"

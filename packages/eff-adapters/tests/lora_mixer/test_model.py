import copy

import pytest
import torch
from eff_adapters.lora_mixer import FreshExpert, LoraMixer, LoraMixerConfig, RoutedLoraLinear, apply_lora_mixer

MODES = ("soft", "sparse", "hard")


@pytest.fixture
def mixed(case):
    model = case.make()
    return model, apply_lora_mixer(model, case.config(), experts=case.three(model))


def test_zero_factors_keep_the_bits_and_remove_gives_the_model_back(case):
    model = case.make()
    before, tree = case.logits(model), [(n, type(m)) for n, m in model.named_modules()]
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    experts = {"a": FreshExpert(rank=4), "b": FreshExpert(rank=16, alpha=3.0)}
    mixer = apply_lora_mixer(model, case.config(), experts=experts)
    for mode in MODES:
        assert torch.equal(case.run(mixer, mode, (0, 1, 1)), before)
    mixer.remove()
    mixer.remove()
    assert [(n, type(m)) for n, m in model.named_modules()] == tree
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert torch.equal(case.logits(model), before)
    assert not any(k.startswith("_eff") for k in vars(model))


def test_one_expert_is_the_adapter_of_peft(case):
    model = case.make()
    source = case.adapter(model, rank=6)
    wanted = case.peft_logits(model, source, case.ids)
    assert not torch.allclose(wanted, case.logits(model), atol=1e-3)
    mixer = apply_lora_mixer(model, case.config(top_k=1), experts={"only": source})
    for mode in MODES:
        torch.testing.assert_close(case.run(mixer, mode, (0, 0, 0)), wanted, atol=1e-5, rtol=1e-5)


def test_hard_routes_are_each_the_adapter_of_peft(case, mixed):
    _, mixer = mixed
    plain = case.make()
    found = case.run(mixer, "hard", ("b", "a", "c"))
    for row, (name, source) in zip((1, 0, 2), case.three(plain).items(), strict=True):
        wanted = case.peft_logits(plain, source, case.ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_the_scaling_of_rank_stabilised_adapters_and_of_patterns(llama_case):
    case, model = llama_case, llama_case.make()
    more = {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}
    source = case.adapter(model, rank=6, **more)
    wanted = case.peft_logits(model, source, case.ids)
    apply_lora_mixer(model, case.config(top_k=1), experts={"only": source})
    torch.testing.assert_close(case.logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_all_experts_are_soft_and_one_is_the_best(case, mixed):
    _, mixer = mixed
    soft = case.run(mixer, "soft")
    for layer in mixer.layers.values():
        layer.top_k = 3
    torch.testing.assert_close(case.run(mixer, "sparse"), soft, atol=1e-5, rtol=1e-5)
    for layer in mixer.layers.values():
        layer.top_k = 1
    one = case.run(mixer, "sparse")
    assert not torch.allclose(one, soft, atol=1e-3)
    for router in mixer.routers.values():
        router.weight.data *= 1e6  # the softmax is then that of the largest logit alone
    torch.testing.assert_close(case.run(mixer, "soft"), case.run(mixer, "sparse"), atol=1e-5, rtol=1e-5)


def test_sure_routers_of_the_same_sign_choose_by_the_token(case, mixed):
    _, mixer = mixed
    case.run(mixer, "sparse")
    loads = [s.load for s in mixer.stats().values()]
    assert all(0 < load.max() < 1 for load in loads)


def test_generation_with_a_cache_is_that_of_full_passes(case, mixed):
    model, mixer = mixed
    mixer.set_mode("sparse")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(case.ids)}
    with_cache = model.generate(case.ids, use_cache=True, **options)
    line = case.ids
    for _ in range(6):
        line = torch.cat([line, case.logits(model, line, use_cache=False)[:, -1:].argmax(-1)], 1)
    assert torch.equal(with_cache, line)


def test_in_hard_mode_the_others_get_no_gradient(case):
    model = case.make()
    mixer = apply_lora_mixer(model, case.config(expert_mode="joint"), experts=case.three(model))
    mixer.set_mode("hard")
    with mixer.route(domain_ids=[2, 0, 2]):
        model(case.ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert not parameter.grad[1].any()
            assert parameter.grad[0].any()
            assert parameter.grad[2].any()
        else:
            assert parameter.grad is None, name


def test_what_is_trained(case, mixed):
    model, mixer = mixed
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.router.weight" for n in mixer.layers}
    mixer.set_trainable(experts=["b"], routers=False)
    mixer.set_mode("soft")
    model(case.ids).logits.square().mean().backward()
    for layer in mixer.layers.values():
        assert layer.router.weight.grad is None
        assert layer.lora_B.grad[1].any()
        assert not layer.lora_B.grad[[0, 2]].any()
        assert not layer.lora_A.grad[[0, 2]].any()
    mixer.set_trainable(experts=False, routers=True)
    (group,) = mixer.parameter_groups()
    assert (group["name"], group["lr"], group["weight_decay"]) == ("routers", 1e-3, 0.0)
    assert len(group["params"]) == len(mixer.layers)


def test_missing_modules_are_never_chosen(llama_case):
    case, model = llama_case, llama_case.make()
    experts = {"a": case.adapter(model), "b": case.adapter(model, targets=("q_proj", "v_proj"), seed=1)}
    mixer = apply_lora_mixer(model, case.config(), experts=experts)
    case.run(mixer, "soft")
    for name, stats in mixer.stats().items():
        if "k_proj" in name or "o_proj" in name:
            assert stats.load.tolist() == [0.5, 0.5]  # two of two are always counted,
            assert stats.entropy == pytest.approx(0, abs=1e-6)  # but one has all of the probability
    assert not mixer.report.skipped
    only = apply_lora_mixer(case.make(), case.config(top_k=1), experts={"b": experts["b"]})
    assert [e.reason for e in only.report.skipped] == ["no expert has weights here"] * 4


def test_projections_of_one_input_share_a_router(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(router_scope="input"), experts=case.three(model))
    assert list(mixer.routers) == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qo"]
    first = mixer.layers["model.layers.0.self_attn.q_proj"].router
    assert mixer.layers["model.layers.0.self_attn.v_proj"].router is first
    twin = LoraMixer(copy.deepcopy(model))
    assert len(twin.routers) == 4
    assert torch.equal(case.run(twin, "sparse"), case.run(mixer, "sparse"))


def test_experts_come_and_go(case, mixed):
    model, mixer = mixed
    plain = case.make()
    before = {mode: case.run(mixer, mode) for mode in MODES}
    more = case.adapter(plain, rank=20, seed=7)
    mixer.add_expert("d", more)
    assert mixer.experts == ("a", "b", "c", "d")
    wanted = case.peft_logits(plain, more, case.ids)
    torch.testing.assert_close(case.run(mixer, "hard", ("d",) * 3), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.run(mixer, "hard"), before["hard"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(case.run(mixer, "soft"), before["soft"], atol=1e-4)
    mixer.remove_expert("d")
    for mode in MODES:
        torch.testing.assert_close(case.run(mixer, mode), before[mode], atol=1e-5, rtol=1e-5)
    mixer.remove_expert("a")
    torch.testing.assert_close(case.run(mixer, "hard", ("b",) * 3)[1], before["hard"][1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="top_k=2 is more than the 1 experts"):
        mixer.remove_expert("c")
    mixer.remove()
    assert torch.equal(case.logits(model), case.logits(plain))


def test_projections_without_an_expert_are_routed_no_more(llama_case):
    case, model = llama_case, llama_case.make()
    experts = {"a": case.adapter(model), "b": case.adapter(model, targets=("q_proj", "v_proj"), seed=1)}
    settings = case.config(top_k=1, expert_mode="joint", preserve_coef=1.0)
    mixer = apply_lora_mixer(model, settings, experts=experts)
    mixer.remove_expert("a")
    assert {n.rpartition(".")[2] for n in mixer.layers} == {"q_proj", "v_proj"}
    wanted = case.peft_logits(case.make(), experts["b"], case.ids)
    torch.testing.assert_close(case.run(mixer, "sparse"), wanted, atol=1e-5, rtol=1e-5)
    assert mixer.preservation() == 0


def test_number_of_parameters_of_a_large_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8,
            )
        )  # fmt: skip
    for rank, wanted in ((8, 6_815_744), (16, 13_631_488)):
        mixer = apply_lora_mixer(model, experts={f"e{i}": FreshExpert(rank=rank) for i in range(6)})
        assert sum(r.weight.numel() for r in mixer.routers.values()) == 3_145_728
        factors = sum(layer.lora_A[0].numel() + layer.lora_B[0].numel() for layer in mixer.layers.values())
        assert factors == wanted
        mixer.remove()


def test_other_architectures():
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    ids = torch.randint(1, 60, (2, 6))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    for model, targets, count, inputs in (
        (gpt2, ("c_attn", "attn.c_proj"), 2, {"input_ids": ids}),
        (t5, ("q", "k", "v", "o"), 12, {"input_ids": ids, "decoder_input_ids": ids}),
    ):
        with torch.no_grad():
            before = model(**inputs).logits
        settings = LoraMixerConfig(target_modules=targets, top_k=1)
        mixer = apply_lora_mixer(model, settings, experts={"a": FreshExpert(rank=2), "b": FreshExpert(rank=4)})
        assert len(mixer.layers) == count
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, before)
            for layer in mixer.layers.values():
                layer.lora_B.normal_()
            assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
        mixer.remove()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case, dtype):
    """The model's dtype is kept, the routers stay float32 unless the whole model is cast later."""
    model = case.make()
    wanted = apply_lora_mixer(model, case.config(), experts=case.three(model))
    full = case.run(wanted, "soft")
    state = {n: r.weight.detach().clone() for n, r in wanted.routers.items()}
    half = case.make().to(dtype)
    kept = case.logits(half).dtype
    mixer = apply_lora_mixer(half, case.config(), experts=case.three(case.make()))
    for name, router in mixer.routers.items():
        assert router.weight.dtype == torch.float32
        router.weight.data.copy_(state[name])
    assert all(layer.lora_A.dtype == dtype for layer in mixer.layers.values())
    found = case.run(mixer, "soft")
    assert found.dtype == kept
    assert (found.float() - full).norm() < 0.1 * full.norm()
    other = apply_lora_mixer(
        case.make().to(dtype), case.config(expert_dtype=torch.float32), experts=case.three(case.make())
    )
    assert all(layer.lora_A.dtype == torch.float32 for layer in other.layers.values())
    assert case.run(other, "sparse").dtype == kept


@pytest.mark.parametrize("name", ["Int8Config", "FP4Config", "FP8Config", "W4A8Config"])
def test_quantised_bases(llama_case, name):
    """Of every format: only base_layer(x) is called; the update is that on a float base."""
    eff_quant = pytest.importorskip("eff_quant")
    case, model = llama_case, llama_case.make()
    experts = case.three(model)
    eff_quant.quantize_(model, getattr(eff_quant, name)(), where="*self_attn*")
    before = case.logits(model)
    inner = model.model.layers[0].self_attn.q_proj
    assert type(inner) is not torch.nn.Linear
    mixer = apply_lora_mixer(model, case.config(), experts=experts)
    layer = mixer.layers["model.layers.0.self_attn.q_proj"]
    assert layer.base_layer is inner
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(2, 3, 32)
    layer.set_mode("soft")
    with torch.no_grad():
        plain = RoutedLoraLinear(
            torch.nn.Linear(32, 32), layer.lora_A.data, layer.lora_B.data, layer.scaling.tolist(), layer.router,
            top_k=2, mode="soft",
        )  # fmt: skip
        torch.testing.assert_close(layer(x) - inner(x), plain(x) - plain.base_layer(x), atol=1e-4, rtol=1e-4)
    for mode in MODES:
        assert not torch.allclose(case.run(mixer, mode), before, atol=1e-3)
    mixer.set_mode("soft")
    model(case.ids).logits.sum().backward()
    assert layer.router.weight.grad.any()
    mixer.remove()
    assert torch.equal(case.logits(model), before)

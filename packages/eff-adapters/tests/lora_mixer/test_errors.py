import pytest
import torch
from eff_adapters.lora_mixer import (
    FreshExpert,
    LoraExpert,
    LoraMixer,
    LoraMixerConfig,
    LoraWeights,
    apply_lora_mixer,
)


def settings(**more):
    return LoraMixerConfig(**{"top_k": 1, **more})


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"target_modules": ("q_prj", "v_proj")}, r"'q_prj' fits no linear projection.*near names: \['q_proj'"),
        ({"target_modules": ("self_attn",)}, "'self_attn' fits no linear projection"),
        ({"top_k": 4}, r"top_k=4 is more than the 3 experts \['a', 'b', 'c'\]"),
        ({"usage_k": 5}, "usage_k=5 is more"),
        ({"target_modules": ("q_proj", "v_proj")}, r"also has weights for \['k_proj', 'o_proj'\].*allow_partial"),
        ({"expert_mode": "joint", "preserve_coef": 1.0, "preserve_experts": ("z",)}, r"preserve_experts names \['z'\]"),
    ],
)
def test_settings_that_do_not_fit(llama_case, more, text):
    case, model = llama_case, llama_case.make()
    modules, before = list(model.modules()), case.logits(model)
    with pytest.raises(ValueError, match=text):
        apply_lora_mixer(model, settings(**more), experts=case.three(model))
    assert list(model.modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(case.logits(model), before)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"target_modules": ()}, ValueError),
        ({"top_k": 0}, ValueError),
        ({"temperature": 0.0}, ValueError),
        ({"balance_coef": -1.0}, ValueError),
        ({"entropy_mode": "flat"}, ValueError),
        ({"preserve_coef": 0.1}, ValueError),
        ({"preserve_experts": ("a",)}, ValueError),
        ({"expert_dtype": torch.int8}, ValueError),
        ({"top_k": "3"}, TypeError),
    ],
)
def test_settings_check_themselves(more, error):
    with pytest.raises(error, match=next(iter(more))):
        LoraMixerConfig(**more)


def test_settings_travel_as_json():
    import json

    config = settings(entropy_mode="mutual_information", expert_dtype=torch.bfloat16, router_scope="input")
    assert LoraMixerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_part_of_an_adapter(llama_case):
    case, model = llama_case, llama_case.make()
    config = settings(target_modules=("q_proj", "v_proj"), allow_partial=True)
    mixer = apply_lora_mixer(model, config, experts={"a": case.adapter(model)})
    assert len(mixer.layers) == 4
    assert [e.reason for e in mixer.report.skipped] == ["expert 'a' has weights here, but it is no target"] * 4


def test_sources_that_do_not_fit(llama_case):
    case, model = llama_case, llama_case.make()
    modules = list(model.modules())
    state, config = case.adapter(model)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shape = {**state, key.format("A"): torch.zeros(4, 31)}
    half = {k: v for k, v in state.items() if k != key.format("B")}
    other = {k.replace("layers.1", "layers.9"): v for k, v in state.items()}
    magnitude = {**state, key.format("A").replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(4)}
    conv = {**state, key.format("A"): torch.zeros(4, 32, 1, 1)}
    rank = {**state, key.format("A"): torch.zeros(3, 32)}
    for source, error, text in (
        ((shape, config), ValueError, r"expert 'x' at model.layers.0.self_attn.q_proj: its update is \[32, 31\]"),
        ((half, config), ValueError, "expert 'x': model.layers.0.self_attn.q_proj has only lora_A"),
        ((other, config), ValueError, r"layers\.9.*which the model lacks"),
        ((magnitude, config), ValueError, "lora_magnitude_vector.*DoRA"),
        ((conv, config), ValueError, "convolutions"),
        ((rank, config), ValueError, r"\[3, 32\] and \[32, 4\]"),
        (({}, config), ValueError, "no lora_A and lora_B"),
        (({key.format("A"): [1.0]}, config), TypeError, "is a list, wanted a tensor"),
        ((state, None), TypeError, "settings are a mapping or a LoraConfig"),
        (state, TypeError, "a dict cannot be an expert.*alpha is not in the weights"),
        ("nowhere", FileNotFoundError, "expert 'x': nowhere is not a folder"),
    ):
        with pytest.raises(error, match=text):
            apply_lora_mixer(model, settings(), experts={"x": source})
        assert list(model.modules()) == modules
    for names, text in (({}, "experts is empty"), ({"../x": (state, config)}, "expert name '../x'")):
        with pytest.raises(ValueError, match=text):
            apply_lora_mixer(model, settings(), experts=names)


def test_two_adapters_in_one_state_dict(llama_case):
    state, config = llama_case.adapter(llama_case.make())
    named = {k.replace(".weight", f".{n}.weight"): v for k, v in state.items() for n in "ab"}
    with pytest.raises(ValueError, match="several adapters"):
        LoraExpert.from_state_dict(named, config)


def test_an_adapter_of_another_base_warns(llama_case):
    model = llama_case.make()
    state, config = llama_case.adapter(model)
    model.config._name_or_path = "org/Base-One"
    source = (state, {**config.to_dict(), "base_model_name_or_path": "org/Base-Two"})
    with pytest.warns(UserWarning, match="trained on 'org/Base-Two', the model is 'org/Base-One'"):
        apply_lora_mixer(model, settings(), experts={"a": source})
    again = llama_case.make()
    again.config._name_or_path = "/a/folder/base-one/"
    source = (state, {**config.to_dict(), "base_model_name_or_path": "org/Base-One"})
    apply_lora_mixer(again, settings(), experts={"a": source})


def test_projections_that_peft_has_wrapped(llama_case):
    from peft import get_peft_model

    model = llama_case.make()
    _, config = llama_case.adapter(model)
    peft_model = llama_case.quiet(get_peft_model, model, config)
    with pytest.raises(ValueError, match=r"has adapters of PEFT \(active\)"):
        apply_lora_mixer(model, settings(), experts={"a": FreshExpert()})
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"has adapters of PEFT \(merged\).*unmerge_adapter"):
        apply_lora_mixer(model, settings(), experts={"a": FreshExpert()})


def test_a_second_mixture(llama_case):
    model = llama_case.make()
    first = apply_lora_mixer(model, settings(), experts={"a": FreshExpert()})
    with pytest.raises(ValueError, match="routed already"):
        apply_lora_mixer(model, settings(), experts={"a": FreshExpert()})
    first.remove()
    apply_lora_mixer(model, settings(), experts={"a": FreshExpert()}).remove()
    with pytest.raises(ValueError, match="was removed"):
        _ = first.experts
    with pytest.raises(ValueError, match="has no mixture"):
        LoraMixer(model)


@pytest.mark.parametrize("leaf", ["out_proj", "x_proj", "dt_proj"])
def test_projections_of_a_state_space_model_that_fused_kernels_pass_by(case, leaf):
    model = case.make()
    if "mamba" not in model.config.model_type:
        pytest.skip("of state-space models")
    with pytest.raises(ValueError, match=f"{leaf}: fused kernels of falcon_mamba.*route in_proj"):
        apply_lora_mixer(model, settings(target_modules=(leaf,)), experts={"a": FreshExpert()})


def test_domains_and_names(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, settings(), experts=case.three(model))
    mixer.set_mode("hard")
    for domains, text in (
        ([0, 3, 1], "from -1 .none. to 2, got 0 to 3"),
        (["a", "z", "b"], "no expert 'z'"),
        (torch.zeros(3), "whole numbers"),
        (torch.zeros(3, 7, 1, dtype=torch.long), "whole numbers"),
    ):
        with pytest.raises(ValueError, match=text), mixer.route(domain_ids=domains):
            pass
    with mixer.route(domain_ids=[0, 1]), pytest.raises(ValueError, match="does not fit tokens"):
        case.logits(model)
    mixer.set_mode("soft")
    with mixer.route(attention_mask=torch.ones(3, 8)), pytest.raises(ValueError, match="attention_mask of shape"):
        case.logits(model)
    for call in (lambda: mixer.set_trainable(experts=["z"]), lambda: mixer.remove_expert("z")):
        with pytest.raises(ValueError, match="no expert 'z'"):
            call()
    with pytest.raises(ValueError, match="there is an expert 'a' already"):
        mixer.add_expert("a", FreshExpert())
    with pytest.raises(ValueError, match="mode='warm'"):
        mixer.set_mode("warm")


def test_losses_without_a_forward(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, settings(), experts=case.three(model))
    for call in (mixer.losses, mixer.stats):
        with pytest.raises(RuntimeError, match="no router has run"):
            call()
    case.logits(model)  # outside of a pass nothing is kept
    with pytest.raises(RuntimeError, match="no router has run"):
        mixer.losses()
    mixer.set_mode("hard")
    with mixer.route(domain_ids=[0, 1, 2]):
        case.logits(model)
    with pytest.raises(RuntimeError, match="no router has run"):
        mixer.losses()


def test_a_failed_addition_changes_nothing(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, settings(), experts=case.three(model))
    before, config = case.logits(model), mixer.config
    wrong = LoraExpert(
        weights={"model.layers.0.self_attn.q_proj": LoraWeights(torch.zeros(2, 32), torch.zeros(31, 2), 1.0)}
    )
    with pytest.raises(ValueError, match=r"its update is \[31, 32\]"):
        mixer.add_expert("d", wrong)
    with pytest.raises(ValueError, match="lacks"):
        mixer.add_expert("d", LoraExpert(weights={"model.x": LoraWeights(torch.zeros(2, 3), torch.zeros(3, 2), 1.0)}))
    assert mixer.experts == ("a", "b", "c")
    assert mixer.config is config
    assert torch.equal(case.logits(model), before)


@pytest.mark.parametrize("more", [{"rank": 0}, {"alpha": -1.0}, {"alpha": float("inf")}])
def test_fresh_experts_check_themselves(more):
    with pytest.raises(ValueError, match=next(iter(more))):
        FreshExpert(**more)

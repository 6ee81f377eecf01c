import json

import pytest
import torch
from eff_adapters.lora_mixer import (
    FreshExpert,
    LoraMixerConfig,
    apply_lora_mixer,
    load_lora_mixer,
    read_adapter,
)


@pytest.fixture
def saved(llama_case, tmp_path):
    """A mixture in a folder, with the logits that it gave."""
    case, model = llama_case, llama_case.make()
    experts = {**case.three(model), "new": FreshExpert(rank=2, alpha=5.0, rslora=True)}
    mixer = apply_lora_mixer(
        model, LoraMixerConfig(top_k=2, router_init_std=0.5, router_scope="input"), experts=experts
    )
    with torch.no_grad():
        for layer in mixer.layers.values():
            layer.lora_B[3, :, :2].normal_(0, 0.1)
    mixer.set_mode("soft")
    mixer.save_pretrained(tmp_path / "mix")
    return tmp_path / "mix", case.logits(model), mixer


def write_adapter_of_peft(case, folder, **more):
    """What PEFT itself writes."""
    from peft import get_peft_model, set_peft_model_state_dict

    model = case.make()
    state, config = case.adapter(model, **more)
    peft_model = case.quiet(get_peft_model, model, config)
    set_peft_model_state_dict(peft_model, state)
    peft_model.save_pretrained(folder)
    return state, config


def test_a_mixture_comes_back(llama_case, saved):
    folder, wanted, mixer = saved
    model = llama_case.make()
    again = load_lora_mixer(model, folder)
    assert torch.equal(llama_case.logits(model), wanted)
    assert again.experts == mixer.experts
    assert again.config == mixer.config
    assert len(again.routers) == 4
    assert {p.name for p in folder.iterdir()} == {"experts", "mixer_config.json", "routers.safetensors"}
    again.save_pretrained(folder.parent / "twice")
    for one in folder.rglob("*.safetensors"):
        assert (folder.parent / "twice" / one.relative_to(folder)).read_bytes() == one.read_bytes()


@pytest.mark.parametrize(("name", "number"), [("b", 1), ("new", 3)])
def test_peft_reads_the_experts(llama_case, saved, name, number):
    from peft import PeftModel

    folder, _, mixer = saved
    mixer.set_mode("hard")
    with mixer.route(domain_ids=[number] * 3):
        wanted = llama_case.logits(mixer.model)
    peft_model = llama_case.quiet(PeftModel.from_pretrained, llama_case.make(), folder / "experts" / name)
    torch.testing.assert_close(llama_case.logits(peft_model.eval()), wanted, atol=1e-5, rtol=1e-5)


def test_folders_of_peft_are_read(llama_case, tmp_path):
    case = llama_case
    source = write_adapter_of_peft(case, tmp_path / "a", rank=6, use_rslora=True)
    wanted = case.peft_logits(case.make(), source, case.ids)
    model = case.make()
    mixer = apply_lora_mixer(model, LoraMixerConfig(top_k=1), experts={"a": tmp_path / "a"})
    torch.testing.assert_close(case.logits(model), wanted, atol=1e-5, rtol=1e-5)
    for module, (a, b) in mixer.expert_weights("a").items():
        assert torch.equal(a, source[0][f"base_model.model.{module}.lora_A.weight"])
        assert torch.equal(b, source[0][f"base_model.model.{module}.lora_B.weight"])


def test_routers_move_to_another_base(llama_case, saved):
    folder, _, mixer = saved
    other = apply_lora_mixer(
        llama_case.make(), mixer.config, experts={n: FreshExpert(rank=3) for n in ("p", "q", "r", "s")}
    )
    other.load_routers(folder / "routers.safetensors")
    for name, router in other.routers.items():
        assert torch.equal(router.weight, mixer.routers[name].weight)


def test_a_failed_load_changes_nothing(llama_case, saved):
    folder, _, _ = saved
    model = llama_case.make()
    before, modules = llama_case.logits(model), list(model.modules())

    def refused(error, text):
        with pytest.raises(error, match=text):
            load_lora_mixer(model, folder)
        assert list(model.modules()) == modules
        assert torch.equal(llama_case.logits(model), before)

    weights = folder / "experts" / "b" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(ValueError, "expert 'b'.*not a complete safetensors")
    weights.write_bytes(whole)
    routers = (folder / "routers.safetensors").read_bytes()
    (folder / "routers.safetensors").write_bytes(routers[:-9])
    refused(ValueError, "routers.safetensors is not a complete")
    (folder / "routers.safetensors").unlink()
    refused(FileNotFoundError, "no routers.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2, 2)}, folder / "routers.safetensors")
    refused(ValueError, "holds 1 routers, the mixture has 4")
    (folder / "routers.safetensors").write_bytes(routers)
    content = json.loads((folder / "mixer_config.json").read_text())
    for change, text in (
        ({"version": 7}, "version 7"),
        ({"format": "other"}, "not the configuration of a mixture"),
        ({"experts": "b"}, "'experts'"),
        ({"experts": ["../b"]}, "expert name"),
        ({"modules": content["modules"][:-1]}, "other projections"),
        ({"mode": "dense"}, "mode='dense'"),
    ):
        (folder / "mixer_config.json").write_text(json.dumps({**content, **change}))
        refused(ValueError, text)
    (folder / "mixer_config.json").unlink()
    refused(FileNotFoundError, "no mixer_config.json")


def test_adapters_that_are_refused(llama_case, tmp_path):
    write_adapter_of_peft(llama_case, tmp_path / "a")
    folder = tmp_path / "a"
    settings = json.loads((folder / "adapter_config.json").read_text())
    for change, text in (
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the weights of the base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trained embeddings"),
        ({"some_new_thing": {"on": True}}, "some_new_thing"),
        ({"r": 9}, "weights have rank 4, the adapter's settings say 9"),
        ({"lora_alpha": None}, "lora_alpha=None"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=text):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "some_new_thing": None, "other_new": False}))
    assert len(read_adapter(folder).weights) == 8
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        read_adapter(folder)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_adapter(tmp_path / "b")


def test_pickles_are_not_opened(llama_case, tmp_path):
    state, _ = write_adapter_of_peft(llama_case, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "a" / "adapter_model.bin")
    model = llama_case.make()
    with pytest.raises(ValueError, match=r"expert 'a'.*a pickle"):
        apply_lora_mixer(model, experts={"a": tmp_path / "a"})

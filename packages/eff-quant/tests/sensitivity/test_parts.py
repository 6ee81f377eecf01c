import pytest
import torch
from eff_quant import sensitivity_sweep
from eff_quant.sensitivity import find_parts
from torch import nn

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.15,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_decoders_with_seven_components(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    parts = find_parts(model)
    assert parts.blocks == ("model.layers.0", "model.layers.1")
    assert parts.components == SEVEN
    assert [p.block for p in parts.linears] == [0] * 7 + [1] * 7
    report = sensitivity_sweep(model, torch.arange(40)[None], formats=("nvfp4",))
    assert all(report.kl(p) > 0 for p in report.passes[1:])


def test_gpt2_has_layers_that_share_a_last_name_and_are_transposed(brute_force):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, initializer_range=0.15, vocab_size=128, bos_token_id=None, eos_token_id=None
    )
    model, ids = GPT2LMHeadModel(config).eval(), torch.arange(40)
    parts = find_parts(model)
    assert parts.components == ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    report = sensitivity_sweep(model, [ids], formats=("mxfp4",))
    for component in parts.components:
        (p,) = report.select("component", "only", component=component)
        names = [la.name for la in parts.linears if la.component == component]
        _, kl = brute_force(model, [ids], dict.fromkeys(names, "mxfp4"))
        torch.testing.assert_close(torch.tensor(p.kl), torch.tensor(kl), rtol=1e-2, atol=1e-6)
    assert {(la.rows, la.columns) for la in report.layers if la.component == "c_fc"} == {(256, 64)}


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(32, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))


def test_experts_of_a_list_are_one_component_and_skips_have_reasons():
    model = nn.Module()
    model.stack = nn.ModuleList(Block() for _ in range(4))
    model.stack[2].experts[0].up = nn.modules.linear.NonDynamicallyQuantizableLinear(32, 64)
    parts = find_parts(model, where=lambda name, module: not name.endswith("router"))
    assert parts.blocks == ("stack.0", "stack.1", "stack.2", "stack.3")
    assert parts.components == ("up", "down")
    assert sum(p.component == "up" for p in parts.linears) == 11
    assert "subclass" in parts.skipped["stack.2.experts.0.up"]
    assert parts.skipped["stack.0.router"] == "not asked for (where)"
    named = find_parts(model, blocks="stack.*")
    assert named.blocks == parts.blocks
    assert named.components == ("router", "up", "down")


def test_a_model_without_blocks_says_what_to_do():
    with pytest.raises(ValueError, match=r"in Sequential; name them by a pattern such as blocks='model.layers.\*'"):
        find_parts(nn.Sequential(nn.Linear(4, 4)))

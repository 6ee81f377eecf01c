"""Tiny models with stacked experts, in float and quantised, made once each."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from eff_quant import FP4Config, FP8Config, Int8Config, dequantize_, quantize_
from eff_quant.experts import QuantizedExperts
from torch import nn

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip
CLASSES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 16}),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v3": ("DeepseekV3", LATENT),
}  # fmt: skip
# Activations as they are, so that the dequantised model is the truth up to rounding in float.
FORMATS = {
    "int8": Int8Config(activation="none"),
    "fp8": FP8Config(),
    "mxfp4": FP4Config(format="mxfp4"),
    "nvfp4": FP4Config(),
}


def make(name):
    """A model with weights that keep numbers about as large as they are, so that each expert matters."""
    import transformers

    cls, more = CLASSES[name]
    config = getattr(transformers, f"{cls}Config")(**{**SIZES, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.ndim >= 2:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


class Cell:
    """A class in a format; its models are not to be changed."""

    ids = torch.arange(1, 25).view(2, 12)

    def __init__(self, name, format):
        self.name, self.format, self.config = name, format, FORMATS[format]

    @functools.cached_property
    def float(self):
        return make(self.name)

    @functools.cached_property
    def model(self):
        model = copy.deepcopy(self.float)
        self.report = quantize_(model, self.config)
        return model

    @functools.cached_property
    def plain(self):
        model = copy.deepcopy(self.model)
        dequantize_(model)
        return model

    @functools.cached_property
    def logits(self):
        return logits(self.model, self.ids)

    @property
    def experts(self):
        return {n: m for n, m in self.model.named_modules() if isinstance(m, QuantizedExperts)}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits.float()


def distance(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype, name
        assert torch.equal(x[name].contiguous().view(torch.uint8), y[name].contiguous().view(torch.uint8)), name


@functools.cache
def cell(name, format):
    return Cell(name, format)


@pytest.fixture(name="cell_of", scope="session")
def cell_of_():
    return cell


# Classes that differ from others in names alone have two formats.
CELLS = [(n, f) for n in CLASSES for f in FORMATS if n not in ("qwen2_moe", "olmoe") or f in ("int8", "nvfp4")]


@pytest.fixture(params=[f"{n}-{f}" for n, f in CELLS], name="cell")
def cell_(request):
    return cell(*request.param.rsplit("-", 1))


@pytest.fixture(scope="session")
def tools():
    """Functions that several files of tests use."""
    return SimpleNamespace(logits=logits, distance=distance, same=same, make=make, formats=FORMATS)


class Experts(nn.Module):
    """A module of experts as transformers writes them, without a model around it."""

    def __init__(self, experts=5, hidden=64, inner=32, *, is_transposed=False, has_bias=False, has_gate=True):
        super().__init__()
        first, rows = ("gate_up_proj", 2 * inner) if has_gate else ("up_proj", inner)
        for name, n, k in ((first, rows, hidden), ("down_proj", hidden, inner)):
            shape = (experts, k, n) if is_transposed else (experts, n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * k**-0.5))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, n)))
        self.act_fn = nn.SiLU()
        self.num_experts = experts


@pytest.fixture
def experts():
    """A function that makes experts of transformers' interface, of any of its kinds."""
    from transformers.integrations.moe import use_experts_implementation

    def new(experts=5, *, is_transposed=False, has_bias=False, has_gate=True, dtype=torch.float32):
        class Config:
            _experts_implementation = "grouped_mm"

        class Made(Experts):
            def __init__(self, config):
                super().__init__(experts, is_transposed=is_transposed, has_bias=has_bias, has_gate=has_gate)

            def forward(self, hidden_states, top_k_index, top_k_weights):
                raise NotImplementedError

        torch.manual_seed(1)
        options = {"is_transposed": is_transposed, "has_bias": has_bias, "has_gate": has_gate}
        return use_experts_implementation(**options)(Made)(Config()).to(dtype)

    return new

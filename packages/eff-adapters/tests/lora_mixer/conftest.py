import copy
import warnings

import pytest
import torch
from torch import nn


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
        max_position_embeddings=128, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def falcon_mamba():
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(0)
    config = FalconMambaConfig(
        vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32, initializer_range=0.2,
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return FalconMambaForCausalLM(config).eval()


def quiet(call, *args, **more):
    """Call what has another name in the next version of transformers; PEFT asks for such an attribute too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will be removed in v6", category=FutureWarning)
        return call(*args, **more)


def adapter(model, targets, rank=4, seed=0, **more):
    """State dict and settings of a PEFT adapter whose factors are both random; the model stays as it is."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), **more)
    peft_model = quiet(get_peft_model, copy.deepcopy(model), config)
    state = get_peft_model_state_dict(peft_model)
    return {k: torch.randn_like(v) * 0.15 for k, v in state.items()}, peft_model.peft_config["default"]


def peft_logits(model, source, ids):
    """Logits of the model under PEFT with one adapter."""
    from peft import get_peft_model, set_peft_model_state_dict

    state, config = source
    peft_model = quiet(get_peft_model, copy.deepcopy(model), config)
    set_peft_model_state_dict(peft_model, state)
    with torch.no_grad():
        return peft_model.eval()(ids).logits


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


class Case:
    """A small model with what the tests ask of it."""

    def __init__(self, make, targets):
        self.make, self.targets = make, targets
        self.ids = torch.randint(1, 97, (3, 7), generator=torch.Generator().manual_seed(1))

    def adapter(self, model, **more):
        return adapter(model, more.pop("targets", self.targets), **more)

    def three(self, model):
        """Adapters of ranks 4, 16 and 4."""
        return {n: self.adapter(model, rank=r, seed=i) for i, (n, r) in enumerate((("a", 4), ("b", 16), ("c", 4)))}

    def logits(self, model, ids=None, **more):
        with torch.no_grad():
            return model(self.ids if ids is None else ids, **more).logits

    def config(self, **more):
        from eff_adapters.lora_mixer import LoraMixerConfig

        return LoraMixerConfig(target_modules=tuple(self.targets), **{"top_k": 2, "router_init_std": 0.5, **more})

    def run(self, mixer, mode, domains=None, **more):
        """Logits in a mode, in a pass."""
        mixer.set_mode(mode)
        domains = (0, 1, 2) if domains is None and mode == "hard" else domains
        with mixer.route(domain_ids=domains and list(domains), **more):
            return self.logits(mixer.model)

    peft_logits = staticmethod(peft_logits)
    quiet = staticmethod(quiet)


@pytest.fixture
def llama_case():
    return Case(llama, QKVO)


@pytest.fixture(params=["llama", "falcon_mamba"])
def case(request):
    return Case(llama, QKVO) if request.param == "llama" else Case(falcon_mamba, ("in_proj",))


@pytest.fixture
def draw_layer():
    from eff_adapters.lora_mixer import RoutedLoraLinear, Router

    def draw(experts=5, rank=4, size=12, out=9, dtype=torch.float64, seed=0, **more):
        generator = torch.Generator().manual_seed(seed)
        a, b, r = (
            torch.randn(*s, generator=generator, dtype=dtype)
            for s in ((experts, rank, size), (experts, out, rank), (experts, size))
        )
        torch.manual_seed(seed)
        base = nn.Linear(size, out, dtype=dtype)
        scaling = [0.5 + 0.25 * i for i in range(experts)]
        return RoutedLoraLinear(base, a, b, scaling, Router(r), **{"top_k": 2, **more})

    return draw

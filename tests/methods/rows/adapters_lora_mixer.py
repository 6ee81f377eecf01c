import torch
from eff_adapters.lora_mixer import FreshExpert, LoraMixer, LoraMixerConfig, apply_lora_mixer, load_lora_mixer
from method_table import Row, llama, logits, token_ids

# q and o alone, whose shapes do not depend on the number of key-value heads.
CONFIG = LoraMixerConfig(target_modules=("q_proj", "o_proj"), top_k=2, router_init_std=0.3)


def apply(model):
    torch.manual_seed(3)
    experts = {"a": FreshExpert(rank=2), "b": FreshExpert(rank=4), "c": FreshExpert(rank=3)}
    mixer = apply_lora_mixer(model, CONFIG, experts=experts)
    with torch.no_grad():
        for layer in mixer.layers.values():
            for e, rank in enumerate(layer.ranks):
                layer.lora_B[e, :, :rank].normal_(0, 0.1)
    return mixer


def save(model, folder):
    LoraMixer(model).save_pretrained(folder / "mixture")


def load(folder):
    model = llama()
    load_lora_mixer(model, folder / "mixture")
    return model


ROWS = [
    Row(
        name="lora_mixer",
        make=llama,
        apply=apply,
        run=logits,
        data=token_ids,
        save=save,
        load=load,
        zero=lambda model: apply_lora_mixer(
            model, CONFIG, experts={"a": FreshExpert(rank=2), "b": FreshExpert(rank=2)}
        ),
        cannot={
            "twice": "the model is routed already .*; remove that mixture first",
            "stranger": "target_modules: 'q_proj' fits no linear projection of the model",
        },
        lora=("gate_proj", "down_proj"),
        loose=0.1,  # a token between two experts may go the other way
    )
]

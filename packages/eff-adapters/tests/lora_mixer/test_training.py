import itertools
import math

import pytest
import torch
from eff_adapters.lora_mixer import (
    FreshExpert,
    LoraMixerConfig,
    RoutedLoraLinear,
    Router,
    apply_lora_mixer,
    cosine_with_warmup,
    init_routers_from_prompts,
    router_logits,
    specialization_balance_loss,
)
from torch import nn


def train_router(mode, coef, steps=400):
    """A router over four frozen experts of rank 4 in 32 dimensions, taught by the outputs of the right one.

    Returns the mean entropy over ln E, and how often the most probable expert is the token's own.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    a, b, centers = normal(4, 4, 32) / 32**0.5, normal(4, 32, 4) / 2, normal(4, 32)
    domains = torch.randint(0, 4, (60,), generator=generator).repeat_interleave(8)
    x = 0.6 * centers[domains] + normal(480, 32)
    base = nn.Linear(32, 32).requires_grad_(False)
    layer = RoutedLoraLinear(base, a, b, [1.0] * 4, Router(0.02 * normal(4, 32)), top_k=2, mode="soft")
    layer.train_experts([False] * 4)
    with torch.no_grad():
        wanted = base(x) + torch.einsum("nor,nri,ni->no", b[domains], a[domains], x)
    optimizer = torch.optim.Adam([layer.router.weight], lr=1e-2)
    for _ in range(steps):
        probs = router_logits(x, layer.router.weight).softmax(-1)
        loss = (layer(x) - wanted).square().mean()
        loss = loss + specialization_balance_loss(probs, mode=mode, balance_coef=0.01, entropy_coef=coef).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probs = router_logits(x, layer.router.weight).softmax(-1).detach()
    entropy = specialization_balance_loss(probs).entropy.item() / math.log(4)
    return entropy, (probs.argmax(-1) == domains).float().mean().item()


def test_the_sign_of_the_entropy_shows_in_the_routes():
    none, peaked, printed = (train_router(*c) for c in (("peaked", 0.0), ("peaked", 0.1), ("as_printed", 0.1)))
    assert peaked[0] < 0.95 * none[0]
    assert none[0] < 0.95 * printed[0]
    assert min(none[1], peaked[1], printed[1]) > 0.6  # chance is 0.25


def test_routers_from_prompts_find_their_experts(llama_case):
    case, model = llama_case, llama_case.make()
    config = LoraMixerConfig(top_k=1, target_modules=("q_proj",))
    mixer = apply_lora_mixer(model, config, experts={"low": FreshExpert(), "high": FreshExpert()})
    generator = torch.Generator().manual_seed(3)

    def prompts(name):
        low, high = (1, 20) if name == "low" else (70, 97)
        return torch.randint(low, high, (6, 9), generator=generator)

    mask = torch.ones(6, 9, dtype=torch.long)
    batches = {n: [{"input_ids": prompts(n), "attention_mask": mask}] for n in mixer.experts}
    mixer.set_mode("soft")
    init_routers_from_prompts(mixer, batches, gain=4.0)
    assert {layer.mode for layer in mixer.layers.values()} == {"soft"}  # as before
    for router in mixer.routers.values():
        torch.testing.assert_close(router.weight.norm(dim=-1), torch.full((2,), 4.0))
    mixer.set_mode("sparse")
    with mixer.route(domain_ids=[0] * 6 + [1] * 6):
        case.logits(model, torch.cat([prompts("low"), prompts("high")]))
    load = mixer.stats()["model.layers.0.self_attn.q_proj"].domain_load
    assert load[0, 0] > 0.7
    assert load[1, 1] > 0.7


def test_prompts_must_be_of_all_experts(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, LoraMixerConfig(top_k=1), experts=case.three(model))
    with pytest.raises(ValueError, match=r"prompts are for \['a'\]"):
        init_routers_from_prompts(mixer, {"a": [case.ids]})
    with pytest.raises(ValueError, match="gain=0"):
        init_routers_from_prompts(mixer, {n: [case.ids] for n in "abc"}, gain=0)


def test_course_of_the_learning_rate():
    course = [cosine_with_warmup(step, 100) for step in range(101)]
    assert course[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert course[3] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(course[3:]))
    assert course[100] == pytest.approx(0.1)
    assert cosine_with_warmup(0, 10, warmup=0.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="num_steps=0"):
        cosine_with_warmup(0, 0)


def test_experts_learn_their_domains_and_the_router_finds_them(llama_case):
    """Both stages on a small model: hard training of fresh experts, then the router alone."""
    model = llama_case.make()
    config = LoraMixerConfig(top_k=1, router_init_std=0.02, entropy_coef=1e-3)
    mixer = apply_lora_mixer(model, config, experts={"one": FreshExpert(rank=4), "two": FreshExpert(rank=4)})
    low, high = torch.randint(1, 40, (4, 8)), torch.randint(60, 97, (4, 8))
    ids, domains = torch.cat([low, high]), [0] * 4 + [1] * 4
    targets = torch.cat([low + 1, high - 1])  # each domain has its own rule

    def task_loss():
        with mixer.route(domain_ids=domains):
            logits = model(ids).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    mixer.set_trainable(experts=True, routers=False)
    mixer.set_mode("hard")
    found = []
    for mode, steps in (("hard", 40), ("soft", 30)):
        mixer.set_mode(mode)
        mixer.set_trainable(experts=mode == "hard", routers=mode == "soft")
        optimizer = torch.optim.AdamW(mixer.parameter_groups(expert_lr=2e-2, router_lr=3e-2))
        for _ in range(steps):
            loss = task_loss()
            found.append(loss.item())
            if mode == "soft":
                loss = loss + mixer.losses().total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert found[39] < 0.7 * found[0]
    assert found[-1] < found[40]
    mixer.set_mode("sparse")
    with torch.no_grad():
        assert task_loss().item() < 0.8 * found[0]

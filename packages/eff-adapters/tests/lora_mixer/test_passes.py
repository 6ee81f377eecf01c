import copy
import dataclasses
import threading

import pytest
import torch
from eff_adapters.lora_mixer import LoraMixer, apply_lora_mixer


def test_losses_of_a_padded_batch(llama_case):
    """Left or right padding: the same loss, and no gradient from what stands there."""
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(), experts=case.three(model))
    mixer.set_mode("soft")
    found = []
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
        for row, length in ((0, 9), (1, 5)):
            place = slice(9 - length, 9) if side == "left" else slice(0, length)
            ids[row, place], mask[row, place] = case.ids.flatten()[:length], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with mixer.route(attention_mask=mask):
            model(ids, attention_mask=mask, position_ids=positions)
        losses = mixer.losses()
        found.append((losses.total, losses.balance, losses.entropy))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0][1], torch.tensor(1.0))


def test_losses_are_means_over_the_projections(llama_case):
    from eff_adapters.lora_mixer import router_logits, specialization_balance_loss

    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(entropy_mode="as_printed", usage_k=2), experts=case.three(model))
    mixer.set_mode("soft")
    inputs = {}
    hooks = [m.register_forward_hook(lambda m, a, o: inputs.update({m: a[0].detach()})) for m in mixer.layers.values()]
    with mixer.route():
        model(case.ids)
    for hook in hooks:
        hook.remove()
    each = [
        specialization_balance_loss(router_logits(x, m.router.weight).softmax(-1), mode="as_printed", usage_k=2).total
        for m, x in inputs.items()
    ]
    assert len(each) == 8
    torch.testing.assert_close(mixer.losses().total, torch.stack(each).mean())


def test_stats_by_domain(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(top_k=1), experts=case.three(model))
    case.run(mixer, "soft", (0, 0, 1), attention_mask=torch.ones(3, 7))
    for stats in mixer.stats().values():
        assert stats.load.sum().item() == pytest.approx(1)
        assert 0 < stats.entropy < 1
        assert 0 <= stats.mutual_information <= 1 - stats.entropy
        assert stats.domain_load[2].isnan().all()
        together = (2 * stats.domain_load[0] + stats.domain_load[1]) / 3
        torch.testing.assert_close(together, stats.load)


def test_preserved_experts(llama_case):
    case, model = llama_case, llama_case.make()
    settings = case.config(expert_mode="joint", preserve_coef=0.5, preserve_experts=("b",))
    mixer = apply_lora_mixer(model, settings, experts=case.three(model))
    assert mixer.preservation() == 0
    with torch.no_grad():
        for layer in mixer.layers.values():
            layer.lora_A[0] += 1.0  # of an expert that is not held
            layer.lora_B[1, 0, 0] += 3.0
    mixer.set_mode("soft")
    with mixer.route():
        model(case.ids)
    losses = mixer.losses()
    assert losses.preserve.item() == pytest.approx(9.0 * 8)
    torch.testing.assert_close(losses.total, 0.01 * losses.balance + 0.01 * losses.entropy + 0.5 * losses.preserve)
    losses.preserve.backward()
    layer = mixer.layers["model.layers.0.self_attn.q_proj"]
    assert layer.lora_B.grad[1, 0, 0].item() == pytest.approx(6.0)
    assert not layer.lora_B.grad[0].any()
    twin = LoraMixer(copy.deepcopy(model))
    assert twin.preservation().item() == pytest.approx(72.0)


def test_checkpointing_collects_once(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(), experts=case.three(model))
    mixer.set_mode("soft")
    model.train()

    def gradients():
        model.zero_grad()
        with mixer.route():
            out = model(case.ids, use_cache=False).logits
        (out.square().mean() + mixer.losses().total).backward()
        return [r.weight.grad.clone() for r in mixer.routers.values()], mixer.losses().total.item()

    wanted = gradients()
    case.quiet(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), wanted)
    case.quiet(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": True})
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant"):
        gradients()
    with torch.no_grad():
        assert mixer.losses().total.item() == pytest.approx(wanted[1])


def test_hard_mode_under_checkpointing(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(expert_mode="joint"), experts=case.three(model))
    mixer.set_mode("hard")
    model.train()
    found = []
    for on in (False, True):
        if on:
            case.quiet(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        with mixer.route(domain_ids=[1, 1, 0]):
            model(case.ids, use_cache=False).logits.square().mean().backward()
        found.append([layer.lora_A.grad.clone() for layer in mixer.layers.values()])
    torch.testing.assert_close(found[1], found[0])
    with mixer.route(domain_ids=[1, 1, 0]):
        loss = model(case.ids, use_cache=False).logits.square().mean()
    with pytest.raises(ValueError, match="the backward too"):
        loss.backward()


def test_passes_of_two_threads_do_not_meet(llama_case):
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(), experts=case.three(model))
    mixer.set_mode("hard")
    wanted = {d: case.run(mixer, "hard", d) for d in ((0, 1, 2), (2, 0, 1))}
    barrier, found = threading.Barrier(2), []

    def work(domains):
        try:
            for _ in range(4):
                with mixer.route(domain_ids=list(domains)):
                    barrier.wait(20)
                    found.append(torch.equal(case.logits(model), wanted[domains]))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(d,)) for d in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    with pytest.raises(ValueError, match="needs the domain"):
        case.logits(model)


def test_one_pass_serves_tokens_of_many_shapes(llama_case):
    """A prompt, then single tokens, then ever longer rows: every one gets the domains of its own shape."""
    case, model = llama_case, llama_case.make()
    mixer = apply_lora_mixer(model, case.config(), experts=case.three(model))
    mixer.set_mode("hard")
    domains = [2, 0, 1]
    lengths = [7, 1, *range(2, 12), 7, 1]
    ids = {n: torch.randint(1, 97, (3, n), generator=torch.Generator().manual_seed(n)) for n in lengths}
    with mixer.route(domain_ids=domains):
        together = [case.logits(model, ids[n]) for n in lengths]
    for n, found in zip(lengths, together, strict=True):
        with mixer.route(domain_ids=domains):
            assert torch.equal(case.logits(model, ids[n]), found)
    with mixer.route(domain_ids=[0, 0, 0]):
        assert not torch.equal(case.logits(model, ids[7]), together[0])


def test_a_handle_knows_what_is_routed_after_changes(llama_case):
    case, model = llama_case, llama_case.make()
    some = {"a": case.adapter(model, targets=("q_proj", "v_proj")), "b": case.adapter(model, targets=("q_proj",))}
    config = dataclasses.replace(case.config(top_k=1), target_modules=("q_proj", "v_proj"))
    mixer = apply_lora_mixer(model, config, experts=some)
    case.run(mixer, "sparse")
    assert len(mixer.stats()) == 4
    mixer.remove_expert("a")  # nobody is left at v_proj
    case.run(mixer, "sparse")
    assert set(mixer.stats()) == set(mixer.layers)
    assert len(mixer.stats()) == 2
    mixer.remove()
    with pytest.raises(ValueError, match="removed"):
        case.run(mixer, "hard")

"""The repulsion inside training of diffusers' transformers."""

import copy
import pickle
import warnings

import pytest
import torch
from eff_guidance.memory_bank import RepulsorConfig, bank_repulsion_loss, mean_cosine
from eff_guidance.training import FixedStepTrigger


def train(setting, student, repulsion, steps, first=0, optimizer=None, count=3):
    own = [] if repulsion is None else list(repulsion.parameters())
    optimizer = optimizer or torch.optim.AdamW(
        [p for p in (*student.parameters(), *own) if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    found = []
    for step in range(first, first + steps):
        batch = setting.batch(step, count)
        loss = setting.run(student, batch)
        if repulsion is not None:
            repulsion.update(step)
            loss = loss + repulsion.loss().total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if repulsion is not None:
            repulsion.step()
        found.append(loss.item())
    return found, optimizer


def test_loss_and_bank_by_the_functions(setting):
    student, batch = setting.dit(), setting.batch()
    repulsion = setting.repulsion(student)
    assert repulsion.layer == 0  # the first quarter of four blocks
    seen = {}
    student.transformer_blocks[0].register_forward_hook(lambda m, a, out: seen.update(out=out))
    wanted_bank = []
    for step in range(5):
        batch = setting.batch(step)
        setting.run(student, batch)
        z = torch.nn.functional.normalize(repulsion.head(seen["out"].mean(1)), dim=-1)
        earlier = torch.cat(wanted_bank)[-10:] if wanted_bank else None
        wanted = bank_repulsion_loss(z, earlier, temperature=0.5)
        found = repulsion.loss()
        assert found.repulsion.item() == pytest.approx(wanted.item(), abs=1e-6)
        assert found.total.item() == pytest.approx(0.25 * wanted.item(), abs=1e-6)
        assert found.cosine_keys.item() == pytest.approx(mean_cosine(z).item(), abs=1e-6)
        unit = torch.nn.functional.normalize(seen["out"].mean(1), dim=1)
        pairs = [unit[i] @ unit[j] for i in range(3) for j in range(3) if i != j]
        assert found.cosine_states.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
        # Between loss and step the bank stays, and it has no gradient.
        before = repulsion.bank.queue.clone()
        found.total.backward()
        assert torch.equal(repulsion.bank.queue, before)
        assert not repulsion.bank.queue.requires_grad
        repulsion.step()
        wanted_bank.append(z.detach())
        assert torch.allclose(repulsion.bank.by_age(), torch.cat(wanted_bank)[-10:], atol=1e-6)
    assert student.transformer_blocks[0].attn1.to_v.weight.grad.abs().sum() > 0
    assert student.transformer_blocks[1].attn1.to_v.weight.grad is None


def test_pushed_once_for_several_parts_of_a_batch(setting):
    student, batches = setting.dit(), [setting.batch(i) for i in range(2)]
    repulsion = setting.repulsion(student)
    for batch in batches:
        (setting.run(student, batch) + repulsion.loss().total).backward()
        assert int(repulsion.bank.filled) == 0
    repulsion.step()
    assert int(repulsion.bank.filled) == 6
    assert int(repulsion.steps) == 1
    repulsion.step()
    assert int(repulsion.bank.filled) == 6
    # Or part by part, after each backward pass.
    other = setting.repulsion(student)
    for i, batch in enumerate(batches):
        (setting.run(student, batch) + other.loss().total).backward()
        other.step()
        assert int(other.bank.filled) == 3 * (i + 1)
    assert torch.equal(other.bank.queue, repulsion.bank.queue)
    # Changing the bank before the backward pass would make a wrong gradient: autograd notices.
    setting.run(student, batches[0])
    found = repulsion.loss()
    repulsion.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.total.backward()


@pytest.mark.parametrize("settings", [{}, {"key_encoder": "ema", "warmup_steps": 7}, {"warmup_steps": "fill"}])
def test_a_resumed_run_is_the_unbroken_one(setting, settings, tmp_path):
    student = setting.dit()
    repulsion = setting.repulsion(student, **settings)
    whole, _ = train(setting, student, repulsion, 8)
    first = setting.dit()
    holding = setting.repulsion(first, **settings)
    part, optimizer = train(setting, first, holding, 5)
    torch.save([first.state_dict(), holding.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    second = setting.dit(seed=3)
    resumed = setting.repulsion(second, **settings)
    _, own = train(setting, second, resumed, 0)
    for x, state in zip((second, resumed, own), states, strict=True):
        x.load_state_dict(state)
    rest, _ = train(setting, second, resumed, 3, first=5, optimizer=own)
    assert part + rest == whole
    for a, b in zip(repulsion.bank.buffers(), resumed.bank.buffers(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="size mismatch"):
        setting.repulsion(second, dim=5).load_state_dict(repulsion.state_dict())


def test_the_weight_rises_with_the_bank_or_the_steps(setting):
    student = setting.dit()
    repulsion = setting.repulsion(student, warmup_steps="fill")
    found = []
    for step in range(5):
        found.append(repulsion.current_weight.item())
        setting.run(student, setting.batch(step))
        repulsion.loss()
        repulsion.step()
    assert found == pytest.approx([0, 0.25 * 0.3, 0.25 * 0.6, 0.25 * 0.9, 0.25])
    counted = setting.repulsion(student, warmup_steps=2)
    found = []
    for _ in range(4):
        found.append(counted.current_weight.item())
        counted.step()
    assert found == [0, 0.125, 0.25, 0.25]


def test_ids_keep_a_picture_from_repelling_itself(setting):
    student, batch = setting.dit(), setting.batch()
    repulsion = setting.repulsion(student, with_ids=True)
    ids = torch.tensor([5, 6, 7])
    setting.run(student, batch)
    first = repulsion.loss(ids=ids)
    repulsion.step()
    assert repulsion.bank.ids[:3].tolist() == [5, 6, 7]
    setting.run(student, batch)  # the same pictures: each has one copy of itself in the bank
    second = repulsion.loss(ids=ids)
    setting.run(student, batch)
    others = repulsion.loss(ids=ids + 10)
    assert second.repulsion.item() == pytest.approx(first.repulsion.item(), abs=1e-5)
    assert others.repulsion > second.repulsion + 1e-3  # each one's own copy is the nearest key there is


def test_only_low_noise_takes_part(setting):
    student, batch = setting.dit(), setting.batch(count=4)
    repulsion = setting.repulsion(student, t_max=0.5)
    t = torch.tensor([0.1, 0.9, 0.4, 0.5])
    setting.run(student, batch)
    found = repulsion.loss(timesteps=t)
    repulsion.step()
    assert int(repulsion.bank.filled) == 2
    whole = setting.repulsion(student)
    setting.run(student, {k: v[[0, 2]] for k, v in batch.items()})
    assert found.repulsion.item() == pytest.approx(whole.loss().repulsion.item(), abs=1e-5)
    setting.run(student, batch)
    none = repulsion.loss(timesteps=torch.ones(4))
    assert none.repulsion == 0
    none.total.backward()
    repulsion.step()
    assert int(repulsion.bank.filled) == 2


def test_keys_of_a_running_average(setting):
    student = setting.dit(layers=8)
    repulsion = setting.repulsion(student, key_encoder="ema", key_decay=0.5)
    own = {n: p.clone() for n, p in student.named_parameters()}
    names = [n for n, m in repulsion.encoder.student.named_modules() if "attn1.to_q" in n]
    assert names == ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"]  # not what comes after
    batch = setting.batch()
    setting.run(student, batch)
    repulsion.loss()
    repulsion.step()
    setting.run(student, batch)
    with torch.no_grad():  # nothing has moved yet: the student's own
        expected = torch.nn.functional.normalize(repulsion.head(repulsion._seen["states"].mean(1)), dim=-1)
    assert torch.allclose(repulsion.bank.keys(), expected, atol=1e-6)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    repulsion.step()
    name = "transformer_blocks.1.attn1.to_q.weight"
    average = dict(repulsion.encoder.student.named_parameters())[name]
    assert torch.allclose(average, own[name] + 0.05, atol=1e-6)
    setting.run(student, batch)
    repulsion.loss()
    repulsion.step()
    assert not torch.allclose(repulsion.bank.queue[3:6], repulsion.bank.queue[:3], atol=1e-4)
    assert not any(p.requires_grad for p in repulsion.encoder.parameters())
    assert not repulsion.train().encoder.training


def test_the_finished_model_is_untouched(setting):
    student, batch = setting.dit(), setting.batch()
    shapes = {k: v.shape for k, v in student.state_dict().items()}
    with torch.no_grad():
        before = setting.run(student, batch)
        repulsion = setting.repulsion(student, key_encoder="ema")
        assert torch.equal(setting.run(student, batch), before)
        assert {k: v.shape for k, v in student.state_dict().items()} == shapes
        assert not any("transformer_blocks" in k and "encoder" not in k for k in repulsion.state_dict())
        repulsion.remove()
        assert torch.equal(setting.run(student, batch), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in student.modules())


def test_the_phase_ends_for_good(setting):
    ended, plain = setting.dit(), setting.dit()
    repulsion = setting.repulsion(ended, trigger=FixedStepTrigger(0), key_encoder="ema")
    found, _ = train(setting, ended, repulsion, 3)
    wanted, _ = train(setting, plain, None, 3)
    assert found == wanted
    assert repulsion.encoder is None
    assert int(repulsion.bank.filled) == 0
    fresh = setting.repulsion(plain, key_encoder="ema")
    fresh.load_state_dict(repulsion.state_dict())
    assert not fresh.active
    assert not fresh.attached


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux"])
@pytest.mark.parametrize("encoder", ["online", "ema"])
def test_joint_transformers(setting, tiny, name, encoder):
    student = tiny.model(name).requires_grad_(True)
    repulsion = setting.repulsion(student, layer=1, key_encoder=encoder)
    inputs = tiny.inputs(student, count=3, side=4)
    for _ in range(2):
        student(**inputs)
        found = repulsion.loss()
        found.total.backward()
        repulsion.step()
    assert int(repulsion.bank.filled) == 6
    assert student.transformer_blocks[1].attn.to_v.weight.grad.abs().sum() > 0
    assert student.proj_out.weight.grad is None


def test_flattened_tokens_go_through_a_first_linear_layer(setting):
    student, batch = setting.dit(), setting.batch()
    repulsion = setting.repulsion(student, pool="flatten+linear", num_tokens=16)
    assert repulsion.head[0].weight.shape == (16, 16 * 16)
    setting.run(student, batch)
    repulsion.loss().total.backward()
    wrong = setting.repulsion(student, pool="flatten+linear", num_tokens=9)
    setting.run(student, batch)
    with pytest.raises(ValueError, match="the head takes 144"):
        wrong.loss()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_overflow(setting, dtype):
    student, batch = setting.dit().to(dtype), setting.batch()
    repulsion = setting.repulsion(student, queue_dtype=str(dtype).removeprefix("torch."))
    low = {k: v.to(dtype) if k in ("clean", "noise") else v for k, v in batch.items()}
    for _ in range(2):
        setting.run(student, low)
        found = repulsion.loss()
        assert found.total.dtype == torch.float32
        found.total.backward()
        repulsion.step()
    assert student.transformer_blocks[0].attn1.to_v.weight.grad.isfinite().all()
    assert int(repulsion.bank.filled) == 6
    # A batch that overflowed does not get into the bank, where it would stay for many steps.
    with torch.no_grad():
        repulsion.head[2].bias.fill_(torch.inf)
        setting.run(student, low)
        repulsion._seen["states"].requires_grad_()
        repulsion.loss()
    repulsion.step()
    assert int(repulsion.bank.filled) == 6
    assert repulsion.bank.queue.isfinite().all()
    fresh = setting.dit()
    other = setting.repulsion(fresh)
    with torch.autocast("cpu", dtype):
        loss = setting.run(fresh, batch) + other.loss().total
    loss.backward()
    assert fresh.transformer_blocks[0].attn1.to_v.weight.grad.isfinite().all()


def test_compiled_students(setting):
    student, batch = setting.dit(layers=1), setting.batch()
    repulsion = setting.repulsion(student)
    setting.run(student, batch)
    wanted = repulsion.loss().repulsion
    repulsion._pending.clear()
    torch._dynamo.reset()
    setting.run(torch.compile(student, backend="eager"), batch)
    assert repulsion.loss().repulsion.item() == pytest.approx(wanted.item(), abs=1e-6)
    torch._dynamo.reset()


def test_copies_and_pickles(setting):
    student, batch = setting.dit(), setting.batch()
    repulsion = setting.repulsion(student)
    train(setting, student, repulsion, 2)
    average = copy.deepcopy(student)
    setting.run(average, batch)
    assert not repulsion._seen
    for copied in (copy.deepcopy(repulsion), pickle.loads(pickle.dumps(repulsion))):
        assert not copied.attached
        copied.attach(average)
        setting.run(average, batch)
        setting.run(student, batch)
        assert torch.equal(copied.loss().repulsion, repulsion.loss().repulsion)
        copied.step()
        assert int(copied.bank.filled) == 9
        assert int(repulsion.bank.filled) == 6
        copied.remove()


def test_refusals(setting):
    student, batch = setting.dit(), setting.batch()
    for changes, text in (
        ({"queue_size": 0}, "queue_size=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"t_max": 0.0}, "t_max=0.0"),
        ({"key_decay": 1.0}, "key_decay=1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"layer": 9}, "layer=9; the student has blocks 0 to 3"),
        ({"layer": "depth/3"}, "layer='depth/3'"),
        ({"queue_dtype": "int8"}, "queue_dtype=torch.int8"),
        ({"pool": "flatten+linear"}, "needs the tokens"),
        ({"weight": -1.0}, "weight=-1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            setting.repulsion(student, **changes)
    with pytest.warns(UserWarning, match="more than a quarter of 39 pictures"):
        setting.repulsion(student, dataset_size=39)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting.repulsion(student, dataset_size=40)
        setting.repulsion(student, dataset_size=12, with_ids=True)
    repulsion = setting.repulsion(student)
    with pytest.raises(RuntimeError, match="run the student before each call"):
        repulsion.loss()
    setting.run(student, batch)
    repulsion.loss()
    with pytest.raises(RuntimeError, match="run the student before each call"):
        repulsion.loss()
    with pytest.raises(ValueError, match="ids are for with_ids=True alone"):
        repulsion.loss(ids=torch.arange(3))
    with pytest.raises(ValueError, match="with_ids=True needs ids"):
        setting.repulsion(student, with_ids=True).loss()
    with pytest.raises(ValueError, match="needs timesteps"):
        setting.repulsion(student, t_max=0.5).loss()
    setting.run(student, batch)
    with pytest.raises(ValueError, match=r"timesteps have shape \[2\]; wanted \[3\]"):
        repulsion.loss(timesteps=torch.rand(2))


def test_config_travels():
    config = RepulsorConfig(layer=3, warmup_steps=10, queue_dtype=torch.float16)
    assert RepulsorConfig.from_dict(config.to_dict()) == config
    assert RepulsorConfig.from_dict(RepulsorConfig().to_dict()) == RepulsorConfig()

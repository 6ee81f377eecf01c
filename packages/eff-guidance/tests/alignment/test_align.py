"""The alignment inside training of diffusers' transformers: who gets gradients, and what is left after the phase."""

import copy
import gc
import weakref

import pytest
import torch
from eff_guidance.alignment import (
    FixedStepTrigger,
    HolisticAlignmentConfig,
    attention_alignment_loss,
    feature_alignment_loss,
)
from torch.utils._python_dispatch import TorchDispatchMode


def train(setting, student, alignment, steps, first=0, optimizer=None):
    """Losses of some steps: the main one, and the sum that was trained on."""
    if optimizer is None:
        own = [] if alignment is None else list(alignment.parameters())
        optimizer = torch.optim.AdamW([*student.parameters(), *own], lr=1e-3, weight_decay=0.0)
    found = []
    for step in range(first, first + steps):
        batch = setting.batch(step)
        if alignment is not None:
            alignment.update(step)
        main = setting.run(student, batch)
        loss = main if alignment is None else main + alignment.losses(batch["pictures"]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((main.item(), loss.item()))
    return found, optimizer


def test_losses_are_those_of_the_functions(setting):
    student, teacher, batch = setting.dit(), setting.teacher(), setting.batch()
    alignment = setting.aligned(student, teacher=teacher)
    hidden = {}
    hook = student.transformer_blocks[2].register_forward_hook(lambda m, a, out: hidden.update(out=out))
    setting.run(student, batch)
    hook.remove()
    found = alignment.losses(batch["pictures"])
    targets = teacher(batch["pictures"], alignment.teacher_layers)
    assert torch.equal(found.feature, feature_alignment_loss(alignment.projector(hidden["out"]), targets.features))
    maps = []
    for i, block in enumerate((1, 2)):
        attention = student.transformer_blocks[block].attn1
        seen = []
        own = attention.to_q.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        setting.run(student, batch)
        own.remove()
        q, k = (f(seen[0]).unflatten(2, (3, 8)).transpose(1, 2) for f in (attention.to_q, attention.to_k))
        maps.append(attention_alignment_loss(q, k, targets.queries[i], targets.keys[i], heads=2))
    assert found.attention.item() == pytest.approx(torch.stack(maps).mean().item(), abs=1e-6)
    assert found.total.item() == pytest.approx((0.5 * found.feature + 0.25 * found.attention).item(), abs=1e-6)


@pytest.mark.parametrize("registers", [0, 3])
def test_targets_are_over_patches_alone(setting, registers):
    """Class and register tokens are gone before the softmax: its rows sum to 1 over the patches."""
    teacher, pictures = setting.teacher(registers=registers), setting.batch()["pictures"]
    targets = teacher(pictures, (1, 3))
    assert targets.grid == (4, 4)
    assert targets.features.shape == (3, 16, 32)
    q, k = targets.queries[1], targets.keys[1]
    assert q.shape == k.shape == (3, 4, 16, 8)
    model = teacher.model
    model.set_attn_implementation("eager")
    out = model(teacher.pixels(pictures), output_attentions=True)
    prefix = 1 + registers
    whole = out.attentions[3][:, :, prefix:, prefix:]
    weights = (q @ k.mT * targets.scales[1]).softmax(-1)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 4, 16), atol=1e-6)
    assert torch.allclose(weights, whole / whole.sum(-1, keepdim=True), atol=1e-5)
    assert whole.sum(-1).max() < 1 - 1e-3
    assert torch.allclose(targets.features, out.last_hidden_state[:, prefix:], atol=1e-5)
    teacher.feature_layer = 2
    states = model(teacher.pixels(pictures), output_hidden_states=True).hidden_states
    assert torch.allclose(teacher(pictures).features, states[3][:, prefix:])


def test_gradients_reach_aligned_blocks_and_heads_alone(setting):
    student = setting.dit()
    alignment = setting.aligned(student)
    batch = setting.batch()
    setting.run(student, batch)
    losses = alignment.losses(batch["pictures"])
    blocks = student.transformer_blocks
    (0 * losses.feature + losses.attention).backward()
    for block in blocks[3:]:
        assert all(p.grad is None for p in block.parameters())
    for i in (0, 1, 2):
        assert blocks[i].attn1.to_q.weight.grad.abs().sum() > 0
    # Of the last aligned block the loss of attention reaches queries and keys of heads 0 and 1; head 2 stays free.
    for linear in (blocks[2].attn1.to_q, blocks[2].attn1.to_k):
        assert linear.weight.grad[:16].abs().sum() > 0
        assert not linear.weight.grad[16:].any()
    assert not blocks[2].attn1.to_v.weight.grad.any()  # only through the feature, whose loss is taken 0 times
    assert student.proj_out_2.weight.grad is None
    student.zero_grad()
    setting.run(student, batch)
    alignment.losses(batch["pictures"]).feature.backward()
    assert blocks[2].attn1.to_v.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in blocks[3].parameters())
    assert all(p.grad is not None for p in alignment.projector.parameters())


class Operations(TorchDispatchMode):
    """Each operation with the sizes of what it puts out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.seen.append((str(func), [tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)]))
        return out


def test_after_the_phase_training_is_plain_training(setting):
    """Bit for bit, operation for operation: no teacher, no projector, no logits; hence the same time and memory."""
    teacher = setting.teacher()
    model, calls = teacher.model, []
    model.register_forward_hook(lambda *a: calls.append(1))
    ended, plain = setting.dit(), setting.dit()
    alignment = setting.aligned(ended, teacher=teacher, trigger=FixedStepTrigger(2))
    with_it, optimizer = train(setting, ended, alignment, 2)
    assert len(calls) == 2
    assert with_it[0][0] != with_it[0][1]
    plain.load_state_dict(ended.state_dict())
    _, other = train(setting, plain, None, 0)
    state = optimizer.state_dict()
    count = len(list(plain.parameters()))
    other.load_state_dict({
        "state": {i: s for i, s in copy.deepcopy(state)["state"].items() if i < count},
        "param_groups": [{**state["param_groups"][0], "params": list(range(count))}],
    })  # fmt: skip
    assert alignment.active
    after, _ = train(setting, ended, alignment, 3, first=2, optimizer=optimizer)
    wanted, _ = train(setting, plain, None, 3, first=2, optimizer=other)
    assert not alignment.active
    assert [a for a, _ in after] == [b for _, b in after] == [a for a, _ in wanted]
    assert all(torch.equal(a, b) for a, b in zip(ended.parameters(), plain.parameters(), strict=True))
    assert len(calls) == 2
    logs = []
    for student in (ended, plain):
        with Operations() as log:
            setting.run(student, setting.batch(9)).backward()
        logs.append(log.seen)
    assert logs[0] == logs[1]
    pictures = setting.batch(9)["pictures"]
    with Operations() as log:
        alignment.losses(pictures)
    assert [name for name, _ in log.seen] == ["aten.zeros.default"]
    assert all("forward" not in vars(m) for m in ended.modules())
    assert not any(p.requires_grad or p.grad is not None for p in alignment.parameters())


def test_the_teacher_is_freed(setting):
    student = setting.dit()
    alignment = setting.aligned(student)
    gone = weakref.ref(alignment.teacher.model)
    train(setting, student, alignment, 1)
    alignment.terminate()
    gc.collect()
    assert gone() is None
    assert alignment.teacher is None
    assert alignment.attach(student).attached is False
    assert alignment.losses().total.item() == 0


@pytest.mark.parametrize("end", [2, 6])
def test_resume_on_both_sides_of_the_end(setting, end, tmp_path):
    """A checkpoint from before the end and one from after it give the trajectory of the unbroken run."""

    def fresh():
        student = setting.dit()
        alignment = setting.aligned(student, trigger=FixedStepTrigger(end))
        return student, alignment

    student, alignment = fresh()
    whole, _ = train(setting, student, alignment, 8)
    first, holding = fresh()
    part, optimizer = train(setting, first, holding, 4)
    state = {"student": first.state_dict(), "alignment": holding.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second, resumed = fresh()
    own = torch.optim.AdamW([*second.parameters(), *resumed.parameters()], lr=1e-3, weight_decay=0.0)
    second.load_state_dict(state["student"])
    resumed.load_state_dict(state["alignment"])
    assert resumed.active == (end > 4)
    assert resumed.attached == (end > 4)
    assert (resumed.teacher is None) == (end <= 4)
    own.load_state_dict(state["optimizer"])
    rest, _ = train(setting, second, resumed, 4, first=4, optimizer=own)
    assert part + rest == whole
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), student.parameters(), strict=True))
    # Never on again: not by an earlier step, not by an earlier state.
    assert not resumed.active
    assert not resumed.update(0)
    with pytest.raises(ValueError, match="switched off for good"):
        resumed.load_state_dict(fresh()[1].state_dict())


def test_weights_of_zero_are_plain_training(setting):
    config = HolisticAlignmentConfig(lambda_feature=0.0, lambda_attention=0.0, teacher_dim=32)
    teacher, calls = setting.teacher(), []
    teacher.model.register_forward_hook(lambda *a: calls.append(1))
    one, two = setting.dit(), setting.dit()
    found, _ = train(setting, one, setting.aligned(one, config, teacher=teacher), 3)
    wanted, _ = train(setting, two, None, 3)
    assert found == wanted
    assert not calls


def test_one_of_both_and_known_targets(setting):
    """REPA is the feature alone; targets that are known take the place of the teacher."""
    batch, results = setting.batch(), {}
    for which in ("lambda_feature", "lambda_attention"):
        student = setting.dit()
        config = HolisticAlignmentConfig.from_dict({**setting.config.to_dict(), which: 0.0})
        alignment = setting.aligned(student, config, teacher=None)
        targets = setting.teacher()(batch["pictures"], alignment.teacher_layers)
        setting.run(student, batch)
        results[which] = alignment.losses(targets=targets)
    assert results["lambda_attention"].attention == 0 != results["lambda_attention"].feature
    assert results["lambda_feature"].feature == 0 != results["lambda_feature"].attention
    student = setting.dit()
    both = setting.aligned(student)
    setting.run(student, batch)
    found = both.losses(batch["pictures"])
    assert torch.equal(found.attention, results["lambda_feature"].attention)
    assert torch.equal(found.feature, results["lambda_attention"].feature)


def test_refusals(setting):
    student, batch = setting.dit(), setting.batch()

    def config(**changes):
        return HolisticAlignmentConfig.from_dict({**setting.config.to_dict(), **changes})

    for changes, text in (
        ({"feature_layer": 5}, "feature_layer=5; the student has blocks 0 to 4"),
        ({"attention_pairs": [[9, 1]]}, "attention_pairs=9; the student has"),
        ({"attention_pairs": [[1, 4]]}, r"name blocks \[4\]; the teacher has 0 to 3"),
        ({"heads": 5}, "heads=5; the teacher has 4 heads"),
        ({"teacher_dim": 31}, "teacher_dim=31; the teacher's features have 32"),
        ({"blocks": ["nothing*"]}, "selects no module"),
    ):
        with pytest.raises(ValueError, match=text):
            setting.aligned(student, config(**changes))
    for changes, text in (
        ({"heads": 0}, "heads=0"),
        ({"lambda_feature": -1.0}, "lambda_feature=-1.0"),
        ({"attention_pairs": []}, "give pairs, or set lambda_attention=0"),
        ({"feature_layer": -1}, "count from 0"),
    ):
        with pytest.raises(ValueError, match=text):
            config(**changes)
    alignment = setting.aligned(student, config(heads=4))  # one more than the student has
    setting.run(student, batch)
    with pytest.raises(ValueError, match="heads=4; the student has 3"):
        alignment.losses(batch["pictures"])
    alignment.remove()
    alignment = setting.aligned(student)
    with pytest.raises(RuntimeError, match="run the student"):
        alignment.losses(batch["pictures"])
    setting.run(student, batch)
    with pytest.raises(ValueError, match="needs clean pictures"):
        alignment.losses()
    alignment.losses(batch["pictures"])
    with pytest.raises(RuntimeError, match="run the student before each call"):
        alignment.losses(batch["pictures"])
    with torch.no_grad():
        setting.run(student, batch)
    with pytest.raises(RuntimeError, match="no_grad"):
        alignment.losses(batch["pictures"])
    setting.run(student, batch)
    with pytest.raises(ValueError, match="one B and C"):
        alignment.losses(batch["pictures"][:2])
    with pytest.raises(ValueError, match=r"wanted \[B, 3, H, W\]"):
        alignment.teacher(batch["pictures"][0])
    alignment.teacher.size = None
    with pytest.raises(ValueError, match="not multiples of 14; set size="):
        alignment.teacher(batch["pictures"])
    with pytest.raises(ValueError, match="does not say what its patch"):
        type(alignment.teacher)(torch.nn.Linear(2, 2))
    alignment.teacher.free()
    with pytest.raises(RuntimeError, match="freed"):
        alignment.teacher(batch["pictures"])


def test_config_travels_and_has_the_settings_of_the_paper():
    config = HolisticAlignmentConfig.for_sit("B", lambda_attention=0.0)
    assert HolisticAlignmentConfig.from_dict(config.to_dict()) == config
    assert config.feature_layer == 4
    assert config.attention_pairs == ((2, 7), (3, 9), (4, 11))
    assert HolisticAlignmentConfig.for_sit("XL") == HolisticAlignmentConfig()
    with pytest.raises(ValueError, match="use one of 'B', 'L', 'XL'"):
        HolisticAlignmentConfig.for_sit("S")

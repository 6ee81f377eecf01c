"""The alignment in transformers of several libraries, in 16 bit, under checkpointing, compiled, copied."""

import copy
import pickle

import pytest
import torch
from eff_guidance.alignment import HolisticAlignmentConfig, TeacherAdapter


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux"])
def test_joint_attention_aligns_the_picture_alone(setting, tiny, name):
    """What the text's queries and keys are does not matter to the loss in the block where it is taken."""
    student = tiny.model(name).requires_grad_(True)
    config = HolisticAlignmentConfig(
        feature_layer=2, attention_pairs=((0, 1), (2, 3)), heads=2, teacher_dim=32, projector_dim=16
    )
    alignment = setting.aligned(student, config)
    inputs = tiny.inputs(student, count=2, side=4)
    pictures = setting.batch(count=2)["pictures"]
    student(**inputs)
    losses = alignment.losses(pictures)
    assert losses.feature.isfinite()
    losses.total.backward()
    blocks = student.transformer_blocks
    assert blocks[0].attn.to_q.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.proj_out.parameters())
    # With only the first block's attention, the text's projections of that block get no gradient.
    student.zero_grad()
    one = HolisticAlignmentConfig(attention_pairs=((0, 1),), heads=2, lambda_feature=0.0, teacher_dim=32)
    alone = setting.aligned(student, one)
    student(**inputs)
    alone.losses(pictures).total.backward()
    assert blocks[0].attn.to_q.weight.grad.abs().sum() > 0
    assert blocks[0].attn.to_v.weight.grad is None or not blocks[0].attn.to_v.weight.grad.any()
    for text in (blocks[0].attn.add_q_proj, blocks[0].attn.add_k_proj):
        assert text.weight.grad is None or not text.weight.grad.any()


def test_a_mismatch_of_tokens_needs_interpolation(setting):
    student, batch = setting.dit(size=12), setting.batch(size=12)
    alignment = setting.aligned(student)
    setting.run(student, batch)
    with pytest.raises(ValueError, match="36 tokens, the teacher 16; interpolate=True"):
        alignment.losses(batch["pictures"])
    alignment.remove()
    config = HolisticAlignmentConfig.from_dict({**setting.config.to_dict(), "interpolate": True})
    alignment = setting.aligned(student, config)
    setting.run(student, batch)
    alignment.losses(batch["pictures"]).total.backward()
    assert student.transformer_blocks[0].attn1.to_k.weight.grad.isfinite().all()


def gradients(setting, student, alignment, batch, autocast=None):
    student.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = setting.run(student, batch) + alignment.losses(batch["pictures"]).total
    loss.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters()}


def test_checkpointing_gives_the_same_gradients(setting):
    student, batch = setting.dit().train(), setting.batch()
    for block in student.modules():
        if hasattr(block, "dropout_prob"):
            block.dropout_prob = 0.0  # of labels
    alignment = setting.aligned(student)
    wanted = gradients(setting, student, alignment, batch)
    student.enable_gradient_checkpointing()
    found = gradients(setting, student, alignment, batch)
    for name, g in wanted.items():
        assert torch.allclose(found[name], g, atol=1e-7), name
    student.enable_gradient_checkpointing(lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=True))
    setting.run(student, {**batch, "clean": batch["clean"].requires_grad_()})
    with pytest.raises(RuntimeError, match="reentrant"):
        alignment.losses(batch["pictures"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(setting, dtype):
    batch, student = setting.batch(), setting.dit()
    alignment = setting.aligned(student)
    wanted = gradients(setting, student, alignment, batch)
    found = gradients(setting, student, alignment, batch, autocast=dtype)
    name = "transformer_blocks.1.attn1.to_q.weight"
    assert (found[name] - wanted[name]).norm() < 0.1 * wanted[name].norm()
    student.to(dtype)
    low = {k: v.to(dtype) if k in ("clean", "noise") else v for k, v in batch.items()}
    setting.run(student, low)
    losses = alignment.losses(batch["pictures"])
    assert losses.total.dtype == torch.float32
    losses.total.backward()
    assert student.transformer_blocks[0].attn1.to_q.weight.grad.isfinite().all()


def test_compiled_before_and_after_the_end(setting):
    student, batch = setting.dit(layers=1), setting.batch()
    changes = {"feature_layer": 0, "attention_pairs": [[0, 1]]}
    alignment = setting.aligned(student, HolisticAlignmentConfig.from_dict({**setting.config.to_dict(), **changes}))
    wanted = gradients(setting, student, alignment, batch)
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="eager")
    student.zero_grad()
    (setting.run(compiled, batch) + alignment.losses(batch["pictures"]).total).backward()
    for name, p in student.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=1e-6), name
    alignment.terminate()
    setting.run(compiled, batch)
    assert not alignment._seen
    torch._dynamo.reset()


def test_copies_and_pickles(setting):
    student, batch = setting.dit(), setting.batch()
    alignment = setting.aligned(student)
    names = set(student.state_dict())
    assert not any("teacher" in k or "student" in k for k in alignment.state_dict())
    twin, average = copy.deepcopy(alignment), copy.deepcopy(student)
    setting.run(average, batch)  # an average of the weights carries no hooks
    assert not alignment._seen
    assert set(average.state_dict()) == names
    for copied in (twin, pickle.loads(pickle.dumps(alignment))):
        assert not copied.attached
        copied.teacher = setting.teacher()
        with pytest.raises(RuntimeError, match="attach"):
            copied.losses(batch["pictures"])
        copied.attach(average)
        setting.run(average, batch)
        setting.run(student, batch)
        assert torch.equal(copied.losses(batch["pictures"]).total, alignment.losses(batch["pictures"]).total)
        copied.remove()
    with torch.no_grad():
        before = setting.run(student, batch)
        alignment.remove()
        assert torch.equal(setting.run(student, batch), before)


def test_timm_students_and_teachers(setting):
    timm = pytest.importorskip("timm")

    torch.manual_seed(0)
    settings = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 0}
    teacher = TeacherAdapter(timm.models.VisionTransformer(**settings))
    assert (teacher.prefix, teacher.patch, teacher.dim) == (1, 14, 32)
    assert teacher(torch.rand(2, 3, 56, 56), (0,)).queries[0].shape == (2, 4, 16, 8)
    free = timm.models.VisionTransformer(**settings, class_token=False, global_pool="avg")
    config = HolisticAlignmentConfig(feature_layer=1, attention_pairs=((1, 2),), heads=4, teacher_dim=32)
    alignment = setting.aligned(free, config, teacher=teacher)
    free(torch.rand(2, 3, 56, 56))
    alignment.losses(torch.rand(2, 3, 56, 56)).total.backward()
    assert free.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
    assert free.blocks[2].attn.qkv.weight.grad is None

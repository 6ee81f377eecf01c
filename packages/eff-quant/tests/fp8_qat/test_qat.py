"""Preparing, freezing, converting: what happens to a model and what comes back."""

import copy
import io

import pytest
import torch
from eff_kernels.edit import Distiller, cosine
from eff_quant import (
    FP8Linear,
    FP8QATConfig,
    FP8Spec,
    convert_qat_,
    fake_quant_fp8,
    freeze_except_,
    prepare_qat_,
)
from eff_quant.fp8_qat import FP8QATLinear
from torch import nn

WEIGHT_ONLY = FP8QATConfig(activation=None)


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.Linear(64, 10))


@pytest.fixture
def x():
    return torch.randn(5, 48)


def test_layers_compute_with_rounded_weights_and_inputs(x):
    net = nn.Sequential(nn.Linear(48, 24))
    weight, bias = net[0].weight, net[0].bias
    handle = prepare_qat_(net)
    expected = nn.functional.linear(fake_quant_fp8(x, FP8Spec()), fake_quant_fp8(weight, FP8Spec()), bias)
    assert torch.equal(net(x), expected)
    assert net[0].weight is weight
    assert isinstance(net[0], nn.Linear)
    handle.enable(weights=True, activations=False)
    assert torch.equal(net(x), nn.functional.linear(x, fake_quant_fp8(weight, FP8Spec()), bias))


@pytest.mark.parametrize("spec", [FP8Spec(dtype="e5m2"), FP8Spec(granularity="block"), FP8Spec(granularity="mx32")])
def test_each_granularity_is_used(x, spec):
    net = nn.Sequential(nn.Linear(48, 24))
    expected = nn.functional.linear(
        fake_quant_fp8(x, spec), fake_quant_fp8(net[0].weight, spec, weight=True), net[0].bias
    )
    prepare_qat_(net, FP8QATConfig(weight=spec, activation=spec))
    assert torch.equal(net(x), expected)


def test_nothing_prepared_changes_no_bit(x):
    net = model()
    before = net(x)
    handle = prepare_qat_(net, FP8QATConfig(skip=("*",)))
    assert handle.replaced == []
    assert torch.equal(net(x), before)


def test_switched_off_and_taken_away_it_is_the_model_of_before(x):
    net = model()
    before, keys, parameters = net(x), list(net.state_dict()), list(net.parameters())
    handle = prepare_qat_(net)
    assert handle.replaced == ["0", "2", "3"]
    assert not torch.equal(net(x), before)
    handle.disable()
    assert torch.equal(net(x), before)
    handle.enable()
    assert not torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    handle.remove()
    handle.remove()
    assert [type(m) for m in net] == [nn.Linear, nn.GELU, nn.Linear, nn.Linear]
    assert "fp8_qat" not in vars(net[0])
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert torch.equal(net(x), before)


def test_skipped_layers_are_reported_with_their_reason():
    net = model()
    handle = prepare_qat_(net, FP8QATConfig(where=("0", "3"), skip=("re:3",)))
    assert handle.replaced == ["0"]
    assert {e.name: e.reason for e in handle.report.skipped} == {
        "2": "not asked for (where)",
        "3": "on the skip list (re:3)",
    }


def test_a_prepared_checkpoint_loads_into_an_unprepared_model(x):
    net = model()
    prepare_qat_(net)
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    plain = model()
    plain.load_state_dict(torch.load(file))
    assert torch.equal(plain[0].weight, net[0].weight)
    prepare_qat_(plain)
    assert torch.equal(plain(x), net(x))


def test_only_listed_parameters_change_in_training(x):
    net = model()
    prepare_qat_(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    assert freeze_except_(net, ["3"]) == ["3.weight", "3.bias"]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    target = torch.randn(5, 10)
    losses = []
    for _ in range(10):
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"3.weight", "3.bias"}
    assert losses[-1] < losses[0]


def count_roundings(monkeypatch):
    counted = []

    def counting(x, spec, **options):
        counted.append(options.get("weight", False))
        return fake_quant_fp8(x, spec, **options)

    monkeypatch.setattr("eff_quant.fp8_qat.qat.fake_quant_fp8", counting)
    return counted


def test_a_frozen_weight_is_rounded_once_and_again_when_it_has_changed(x, monkeypatch):
    net = nn.Sequential(nn.Linear(48, 24).requires_grad_(False))
    prepare_qat_(net, WEIGHT_ONLY)
    counted = count_roundings(monkeypatch)

    def check(times):
        expected = nn.functional.linear(x, fake_quant_fp8(net[0].weight, FP8Spec()), net[0].bias)
        assert torch.equal(net(x), expected)
        assert torch.equal(net(x), expected)
        assert len(counted) == times

    check(1)
    net[0].weight.add_(0.1)
    check(2)
    net[0].weight.data = torch.randn(24, 48)
    check(3)
    net[0].weight = nn.Parameter(torch.randn(24, 48), requires_grad=False)
    check(4)
    net.load_state_dict({"0.weight": torch.ones(24, 48), "0.bias": torch.zeros(24)})
    check(5)
    net.double()
    x = x.double()
    check(6)
    net[0].weight.requires_grad_()
    net(x)
    net(x)
    assert len(counted) == 8  # in training each pass has its own


def test_the_copy_can_be_switched_off_and_is_not_copied_or_saved(x, monkeypatch):
    net = nn.Sequential(nn.Linear(48, 24).requires_grad_(False))
    prepare_qat_(net, FP8QATConfig(activation=None, cache_frozen_weights=False))
    counted = count_roundings(monkeypatch)
    net(x)
    net(x)
    assert len(counted) == 2
    other = nn.Sequential(nn.Linear(48, 24).requires_grad_(False))
    prepare_qat_(other, WEIGHT_ONLY)
    y = other(x)
    twin = copy.deepcopy(other)
    with torch.no_grad():
        other[0].weight.zero_()
    assert torch.equal(twin(x), y)
    file = io.BytesIO()
    torch.save(other, file)
    assert file.getbuffer().nbytes < 1.5 * (24 * 48 + 24) * 4 + 4000


def test_first_pass_under_inference_mode_does_not_spoil_training(x):
    net = nn.Sequential(nn.Linear(48, 24).requires_grad_(False))
    prepare_qat_(net, WEIGHT_ONLY)
    with torch.inference_mode():
        net(x)
    x.requires_grad_()
    net(x).sum().backward()
    torch.testing.assert_close(x.grad, fake_quant_fp8(net[0].weight, FP8Spec()).sum(0).expand(5, -1))


def test_gradients_pass_straight_through_the_layer(x):
    net = nn.Sequential(nn.Linear(48, 24))
    prepare_qat_(net)
    dy = torch.randn(5, 24)
    x.requires_grad_()
    net(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ fake_quant_fp8(net[0].weight, FP8Spec()))
    torch.testing.assert_close(net[0].weight.grad, dy.t() @ fake_quant_fp8(x.detach(), FP8Spec()))


def test_works_under_autocast_checkpointing_and_compile(x):
    net = model()
    prepare_qat_(net)
    freeze_except_(net, ["3"])
    eager = net(x)
    again = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    assert torch.equal(again, eager)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), eager)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), eager, rtol=0.05, atol=0.05)


def test_models_that_cannot_be_prepared_are_refused():
    with pytest.raises(ValueError, match="itself is one linear layer"):
        prepare_qat_(nn.Linear(2, 2))
    net = model()
    prepare_qat_(net)
    with pytest.raises(ValueError, match=r"prepared already \(0 and 2 more\)"):
        prepare_qat_(net)


def test_freezing_names_patterns_that_take_in_nothing():
    net = nn.ModuleDict({"block": nn.ModuleDict({"proj_lin": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})})
    assert freeze_except_(net, ["proj_lin"]) == ["block.proj_lin.weight", "block.proj_lin.bias"]
    assert freeze_except_(net, ["*.bias", "block.mlp"]) == ["block.proj_lin.bias", "block.mlp.weight", "block.mlp.bias"]
    with pytest.raises(ValueError, match=r"\['head'\] match no parameter"):
        freeze_except_(net, ["mlp", "head"])
    with pytest.raises(TypeError, match="one string"):
        freeze_except_(net, "mlp")


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (WEIGHT_ONLY, "fp8_weight_only"),
        (FP8QATConfig(weight=FP8Spec(dtype="e5m2", power_of_two=True), activation=None), "fp8_weight_only"),
        (FP8QATConfig(), "fp8_dynamic"),
    ],
)
def test_converted_models_compute_what_was_trained(x, config, target):
    net = model()
    prepare_qat_(net, config)
    expected = net(x)
    report = convert_qat_(net, target)
    assert [e.name for e in report.changed] == ["0", "2", "3"]
    assert all(isinstance(net[i], FP8Linear) for i in (0, 2, 3))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, FP8QATLinear) for m in net.modules())


def test_converted_in_bfloat16_they_agree_to_its_rounding(x):
    net = model().bfloat16()
    prepare_qat_(net, WEIGHT_ONLY)
    expected = net(x.bfloat16())
    convert_qat_(net)
    torch.testing.assert_close(net(x.bfloat16()).float(), expected.float(), rtol=2**-6, atol=2**-7)


def test_stored_is_a_byte_for_each_weight_and_a_scale_for_each_row():
    net = model()
    prepare_qat_(net, WEIGHT_ONLY)
    report = convert_qat_(net)
    assert [e.bytes_after for e in report.changed] == [
        64 * 48 + 4 * 64 + 4 * 64,  # with the bias
        64 * 64 + 4 * 64,
        10 * 64 + 4 * 10 + 4 * 10,
    ]


def test_plain_gives_linear_layers_with_the_trained_weights(x):
    net = model()
    prepare_qat_(net)
    weight = net[0].weight
    convert_qat_(net, "plain")
    assert type(net[0]) is nn.Linear
    assert net[0].weight is weight
    assert torch.equal(net(x), model()(x))


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (FP8QATConfig(), "fp8_weight_only", "0: inputs were rounded"),
        (WEIGHT_ONLY, "fp8_dynamic", "0: inputs were prepared with None"),
        (FP8QATConfig(activation=FP8Spec(dtype="e5m2")), "fp8_dynamic", "e5m2"),
        (FP8QATConfig(weight=FP8Spec(granularity="block"), activation=None), "fp8_weight_only", "each block"),
    ],
)
def test_another_scheme_is_refused_before_anything_changes(config, target, message):
    net = model()
    prepare_qat_(net, config)
    with pytest.raises(ValueError, match=f"3 layers were prepared(.|\n)*{message}"):
        convert_qat_(net, target)
    assert all(isinstance(net[i], FP8QATLinear) for i in (0, 2, 3))
    assert len(convert_qat_(net, target, allow_mismatch=True).changed) == 3


def test_what_was_not_prepared_is_reported():
    net = model()
    prepare_qat_(net, FP8QATConfig(skip=("3",), activation=None))
    report = convert_qat_(net)
    assert [(e.name, e.reason) for e in report.skipped] == [("3", "is not prepared")]
    with pytest.raises(ValueError, match="no prepared layers"):
        convert_qat_(net)


def test_a_converted_model_still_trains_what_stands_before_it(x):
    net = model()
    prepare_qat_(net, WEIGHT_ONLY)
    convert_qat_(net)
    plain = nn.Sequential(*(m.to_linear() if isinstance(m, FP8Linear) else m for m in net))
    grads = []
    for function in (net, plain):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_settings_travel_as_json():
    import json

    config = FP8QATConfig(activation=None, weight=FP8Spec(dtype="e5m2", granularity="block"), skip=("a", "re:b.*"))
    assert FP8QATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert FP8QATConfig.from_dict(FP8QATConfig().to_dict()) == FP8QATConfig()
    with pytest.raises(ValueError, match=r"has no \['foo'\]"):
        FP8QATConfig.from_dict({"foo": 1})
    with pytest.raises(ValueError, match="version 9"):
        FP8QATConfig.from_dict({"version": 9})
    with pytest.raises(TypeError, match="one string"):
        FP8QATConfig(skip="a")
    with pytest.raises(ValueError, match="powers of two"):
        FP8QATConfig(weight=FP8Spec(power_of_two=True), scale_grad=True)


def test_a_distiller_brings_a_student_under_noise_to_its_teacher(x):
    teacher, student = model(), model()
    with torch.no_grad():
        student[0].weight.mul_(1.5)
    prepare_qat_(student, FP8QATConfig(skip=()))
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    losses = []
    with Distiller(student, teacher, ["0", "2"], weight=cosine(0.1, 0.01)) as distiller:
        for _ in range(40):
            with torch.no_grad():
                teacher(x)
            student(x)
            distiller.loss(0.5).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                student(x), teacher(x)
                losses.append(distiller.loss().item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())

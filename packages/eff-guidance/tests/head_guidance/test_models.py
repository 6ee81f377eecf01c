"""Damaged heads beside what else is done with models: copies, compiling, offloading, adapters, threads."""

import copy
import pickle
import threading

import pytest
import torch
from eff_guidance.head_guidance import SoftPAGConfig, apply_head_perturbation, list_heads
from eff_kernels.edit.attention import find_attention, intercept_attention, observe_attention

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@torch.no_grad()
def run(model, given):
    return model(**given, return_dict=False)[0]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_damaged_and_keep_to_themselves(tiny, make):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    before = run(model, given)
    handle = apply_head_perturbation(model, SoftPAGConfig(heads="all", strength=0.5))
    damaged = run(model, given)
    other = make(model)
    assert torch.equal(run(other, given), damaged)
    handle.set_strength(1.0)
    assert torch.equal(run(other, given), damaged)
    assert not torch.equal(run(model, given), damaged)
    handle.remove()
    assert torch.equal(run(model, given), before)
    assert torch.equal(run(other, given), damaged)


def test_another_strength_needs_no_other_graph(tiny):
    model = tiny.model("sd3", layers=2)
    given = tiny.inputs(model)
    handle = apply_head_perturbation(model, SoftPAGConfig(heads=[(0, 1), (1, 0)]))
    eager = {}
    for strength in (1.0, 0.25):
        handle.set_strength(strength)
        eager[strength] = run(model, given)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for strength in (1.0, 0.25):
        handle.set_strength(strength)
        torch.testing.assert_close(run(compiled, given), eager[strength])
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_compiled_model_can_be_damaged(tiny):
    model = tiny.model("flux", layers=1, single=1)
    given = tiny.inputs(model)
    with apply_head_perturbation(model, SoftPAGConfig(heads=[(0, 1), (1, 0)])):
        want = run(model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert list_heads(compiled) == list_heads(model)
    with apply_head_perturbation(compiled, SoftPAGConfig(heads=[(0, 1), (1, 0)])):
        torch.testing.assert_close(run(compiled, given), want)
    torch._dynamo.reset()


def test_autocast_and_bfloat16(tiny):
    model = tiny.model("sd3")
    given = tiny.inputs(model)
    apply_head_perturbation(model, SoftPAGConfig(heads="all", strength=0.5))
    exact = run(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        close = run(model, given).float()
    half = run(model.to(torch.bfloat16), {k: v.to(torch.bfloat16) for k, v in given.items()})
    for found in (close, half.float()):
        assert (found - exact).norm() < 0.05 * exact.norm()


def test_gradients_and_checkpointing(tiny):
    model = tiny.model("flux").requires_grad_(True)
    given = tiny.inputs(model)
    grads = []
    with apply_head_perturbation(model, SoftPAGConfig(heads="all", strength=0.5)):
        for checkpointing in (False, True):
            if checkpointing:
                model.train()
                model.enable_gradient_checkpointing()
            model.zero_grad()
            model(**given, return_dict=False)[0].square().sum().backward()
            grads.append(model.x_embedder.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_layerwise_casting(tiny):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = run(model, given)
    with apply_head_perturbation(model, SoftPAGConfig(heads="all")):
        damaged = run(model, given)
    assert torch.isfinite(damaged).all()
    assert not torch.allclose(damaged, plain)
    assert torch.equal(run(model, given), plain)


@pytest.mark.parametrize("before", [True, False])
def test_group_offload(tiny, before):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    with apply_head_perturbation(model, SoftPAGConfig(heads="all")):
        want = run(model, given)
    plain = run(model, given)
    offload = {"onload_device": torch.device("cpu"), "offload_type": "block_level", "num_blocks_per_group": 1}
    if before:
        model.enable_group_offload(**offload)
    handle = apply_head_perturbation(model, SoftPAGConfig(heads="all"))
    if not before:
        model.enable_group_offload(**offload)
    assert torch.equal(run(model, given), want)
    handle.remove()
    assert torch.equal(run(model, given), plain)


def test_lora(tiny):
    peft = pytest.importorskip("peft")
    model = tiny.model("sd3")
    given = tiny.inputs(model)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    apply_head_perturbation(model, SoftPAGConfig(heads="all"))
    without = run(model, given)
    model.add_adapter(config)
    found = run(model, given)
    assert not torch.allclose(found, without)
    other = tiny.model("sd3")
    other.add_adapter(config)
    other.load_state_dict(model.state_dict())
    apply_head_perturbation(other, SoftPAGConfig(heads="all"))
    assert torch.equal(run(other, given), found)


def test_fused_projections(tiny):
    model = tiny.model("sd3")
    given = tiny.inputs(model)
    with apply_head_perturbation(model, SoftPAGConfig(heads=[(1, 1)], target="image_renorm")):
        want = run(model, given)
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(model, given), want)


def test_quantised_weights(tiny):
    quant = pytest.importorskip("eff_quant")
    model = tiny.model("flux")
    given = tiny.inputs(model)
    quant.quantize_(model, quant.Int8Config())
    plain = run(model, given)
    with apply_head_perturbation(model, SoftPAGConfig(heads="all")):
        damaged = run(model, given)
    assert torch.isfinite(damaged).all()
    assert not torch.allclose(damaged, plain)
    assert torch.equal(run(model, given), plain)


@pytest.fixture
def native_again():
    """diffusers keeps the backend that a model was given for all models."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.usefixtures("native_again")
def test_variants_of_the_native_backend(tiny):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    with apply_head_perturbation(model, SoftPAGConfig(heads=[(0, 0), (2, 1)])):
        want = run(model, given)
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(run(model, given), want)


@pytest.mark.usefixtures("native_again")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_other_backends_are_refused(tiny):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    model.set_attention_backend("flex")
    with (
        apply_head_perturbation(model, SoftPAGConfig(heads="all")),
        pytest.raises(RuntimeError, match="backend 'native'"),
    ):
        run(model, given)


def test_threads_share_a_damaged_model(tiny):
    model = tiny.model("sd3")
    inputs = [tiny.inputs(model, seed=seed) for seed in range(4)]
    with apply_head_perturbation(model, SoftPAGConfig(heads="all")):
        want = [run(model, given) for given in inputs]
        found = [None] * 4

        def work(i):
            for _ in range(5):
                found[i] = run(model, inputs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_rules_of_others_compose(tiny):
    model = tiny.model("sd3")
    given = tiny.inputs(model)

    def louder(call, attend):
        return 2 * attend(call).out

    names = [f.name for f in find_attention(model)]
    with (
        intercept_attention(model, louder, where=names, order=0),
        apply_head_perturbation(model, SoftPAGConfig(heads="all"), order=1),
    ):
        seen = []
        with observe_attention(model, lambda call, out: seen.append(torch.equal(out.out, 2 * call.v))):
            run(model, given)
    assert seen
    assert all(seen)

import pytest
import torch
import torch.nn.functional as F
from eff_attention.sparse_linear import (
    AttentionDistiller,
    SLAConfig,
    apply_sla,
    calibrate_sla,
    cosine,
    freeze_backbone,
    load_sla,
    save_sla,
    sla_modules,
    sla_parameters,
)
from torch import nn

SMALL = SLAConfig(k_high=0.25, k_low=0.25, block_q=8, block_k=8)
WHOLE = SLAConfig(k_high=1.0, k_low=0.0, block_q=8, block_k=8)


class Attention(nn.Module):
    """The layout of DINOv2, VGGT and Depth Anything 3: one qkv layer, norms of q and k."""

    def __init__(self, dim=32, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.camera_head = Attention()

    def forward(self, x, attn_mask=None):
        for block in self.blocks:
            x = x + block(x, attn_mask)
        return x + self.camera_head(x[:, :1])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1))


def test_the_model_comes_back_bit_for_bit(net, x):
    before, keys = net(x), set(net.state_dict())
    with apply_sla(net, SMALL, exclude="camera_head") as handle:
        assert [e.name for e in handle.report.changed] == ["blocks.0", "blocks.1"]
        assert [(e.name, e.reason) for e in handle.report.skipped] == [("camera_head", "excluded")]
        assert keys < set(net.state_dict())
        assert not torch.allclose(net(x), before, atol=1e-3)
        assert [m.ran for _, m in sla_modules(net)] == ["sparse"] * 2
    assert set(net.state_dict()) == keys
    assert torch.equal(net(x), before)
    assert not list(sla_modules(net))


def test_all_blocks_critical_is_the_dense_model(net, x):
    before = net(x)
    with apply_sla(net, WHOLE):
        torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_sparsity_can_be_set_while_it_runs(net, x):
    before = net(x)
    with apply_sla(net, SMALL, exclude="camera_head"):
        errors = []
        for sparsity in (0.9, 0.5, 0.0):
            for _, m in sla_modules(net):
                m.sparsity = sparsity
            errors.append((net(x) - before).norm().item())
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-4


def test_copies_and_pickles_run_on_their_own_weights(net, x, tmp_path):
    import copy

    with apply_sla(net, SMALL, exclude="camera_head"):
        wanted = net(x)
        twin = copy.deepcopy(net)
        torch.save(net, tmp_path / "net.pt")
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        assert torch.equal(twin(x), wanted)
        assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(x), wanted)
        assert not torch.allclose(net(x), wanted)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Dynamo of torch 2.11 cannot trace Tensor.unflatten in a mode")
def test_a_changed_model_compiles_to_one_graph(net, x):
    with apply_sla(net, SMALL, exclude="camera_head"):
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)


def test_short_sequences_run_dense(net, x):
    before = net(x)
    with apply_sla(net, SLAConfig(k_high=0.1, block_q=8, block_k=8, min_tokens=65)):
        assert torch.equal(net(x), before)
        assert {m.ran for _, m in sla_modules(net)} == {"dense"}


def test_masks_are_refused_or_run_dense(net, x):
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    before = net(x, mask)
    with apply_sla(net, SMALL, exclude="camera_head"), pytest.raises(NotImplementedError, match="no attention mask"):
        net(x, mask)
    with apply_sla(net, SLAConfig(fallback="sdpa"), exclude="camera_head"):
        assert torch.equal(net(x, mask), before)
        assert {m.ran for _, m in sla_modules(net)} == {"masked"}


def test_what_cannot_be_sparse_is_said(net, x):
    before = net(x)

    class CausalAttention(nn.Module):
        head_dim = 8

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    class EagerAttention(nn.Module):
        head_dim = 8

        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    class OddAttention(nn.Module):
        pass

    small = torch.randn(1, 1, 16, 8)
    for kind, error, text in (
        (CausalAttention, ValueError, "is causal"),
        (EagerAttention, RuntimeError, "did not call"),
    ):
        holder = nn.Sequential(kind())
        with apply_sla(holder, SMALL, targets="0"), pytest.raises(error, match=text):
            holder(small)
    with pytest.raises(ValueError, match="head dimension of OddAttention cannot be read"):
        apply_sla(nn.Sequential(OddAttention()), SMALL, targets="0")
    with pytest.raises(ValueError, match="OddAttention calls neither"):
        apply_sla(nn.Sequential(OddAttention()), SMALL)
    with pytest.raises(ValueError, match="excluded"):
        apply_sla(net, SMALL, exclude="camera_head", strict=True)
    assert not list(sla_modules(net))
    with apply_sla(net, SMALL), pytest.raises(ValueError, match="sparse-linear attention already"):
        apply_sla(net, SMALL)
    assert torch.equal(net(x), before)


def test_only_the_projections_train(net, x):
    handle = apply_sla(net, SMALL)
    with freeze_backbone(net):
        net(x).square().mean().backward()
        trained = {n for n, p in net.named_parameters() if p.grad is not None}
        assert trained == {
            f"{n}.sla.proj.{k}" for n in ("blocks.0", "blocks.1", "camera_head") for k in ("weight", "bias")
        }
    assert all(p.requires_grad for p in net.parameters())
    assert len(list(sla_parameters(net))) == 6
    handle.remove()


def test_what_is_saved_loads_bit_for_bit(net, x, tmp_path):
    with apply_sla(net, SMALL, exclude="camera_head"):
        for p in sla_parameters(net):
            torch.nn.init.normal_(p)
        next(iter(sla_modules(net)))[1].sparsity = 0.5
        wanted = net(x)
        save_sla(net, tmp_path / "sla.safetensors")
    with load_sla(net, tmp_path / "sla.safetensors"):
        assert torch.equal(net(x), wanted)
    with pytest.raises(ValueError, match="no sparse-linear attention to save"):
        save_sla(net, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"no modules \['blocks.0', 'blocks.1'\]"):
        load_sla(nn.Sequential(Attention()), tmp_path / "sla.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a SLAWeights file"):
        load_sla(net, tmp_path / "other.safetensors")


def clustered(seed):
    """Tokens of eight clusters, each in a block of its own, with noise."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(8, 32, generator=torch.Generator().manual_seed(9)) * 1.5
    return centers.repeat_interleave(8, 0) + 0.5 * torch.randn(4, 64, 32, generator=generator)


def test_calibration_lowers_the_error_on_other_data(net):
    dense, other = net(clustered(5)), clustered(5)
    with apply_sla(net, SLAConfig(k_high=0.125, k_low=0.0, block_q=8, block_k=8), exclude="camera_head"):
        sparse = (net(other) - dense).norm()
        fits = calibrate_sla(net, [clustered(s) for s in range(4)])
        assert [f.name for f in fits] == ["blocks.0", "blocks.1"]
        assert all(f.fitted < 0.9 * f.sparse for f in fits)
        assert (net(other) - dense).norm() < 0.9 * sparse
        assert all(f.tokens == 4 * 4 * 2 * 64 for f in fits)
    with pytest.raises(ValueError, match="apply_sla first"):
        calibrate_sla(net, [other])


def test_the_reported_errors_are_those_of_the_layer():
    torch.manual_seed(0)
    layer = nn.Sequential(Attention())
    handle = apply_sla(layer, SMALL)
    x = clustered(0)
    (fit,) = calibrate_sla(layer, [{"input": x}])
    host = layer[0]
    q, k, v = host.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    q, k = host.q_norm(q), host.k_norm(k)
    dense = F.scaled_dot_product_attention(q, k, v)
    for error, found in ((fit.fitted, host.sla(q, k, v)), (fit.sparse, host.sla.branches(q, k, v).sparse)):
        assert error == pytest.approx(((found - dense).norm() / dense.norm()).item(), rel=1e-3)
    handle.remove()


def test_distilling_lowers_the_error(net):
    import copy

    student = copy.deepcopy(net)
    apply_sla(student, SLAConfig(k_high=0.125, k_low=0.0, block_q=8, block_k=8), exclude="camera_head")
    freeze_backbone(student)
    optimizer = torch.optim.Adam(sla_parameters(student), lr=3e-2)
    with AttentionDistiller(student, net, weight=cosine(1.0, 0.5)) as distiller:
        with pytest.raises(RuntimeError, match="no output of the student"):
            distiller.loss()
        losses = []
        for step in range(60):
            x = clustered(step)
            with torch.no_grad():
                net(x)
            student(x)
            loss = distiller.loss(step / 60)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / cosine(1.0, 0.5)(step / 60))
    assert losses[-1] < 0.9 * losses[0]
    assert not net.blocks[0]._forward_hooks
    assert cosine(0.1, 0.01)(0.0) == pytest.approx(0.1)
    assert cosine(0.1, 0.01)(1.0) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="no sparse-linear attention to distil"):
        AttentionDistiller(net, net)


def test_other_terms_of_attention_are_refused():
    """Dropout, softcaps, sinks and biases would be lost."""
    net = Net()
    net.blocks[0].forward = lambda x, mask=None: F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.1)[:, 0]
    with apply_sla(net, SMALL, targets="blocks.0"), pytest.raises(NotImplementedError, match=r"blocks.0 has dropout"):
        net(torch.randn(1, 16, 16))

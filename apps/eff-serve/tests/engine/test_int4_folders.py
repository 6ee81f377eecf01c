"""Folders of GPTQ, AWQ and compressed-tensors with weights of 4 bits, against weights that are worked out here."""

import json
import shutil

import pytest
import torch
from eff_quant.int4_files import int4_settings
from eff_serve.engine.config import DecoderConfig, UnsupportedModelError
from eff_serve.engine.decoder import Decoder
from eff_serve.engine.groups import GroupLinear
from eff_serve.engine.linear import Separate
from eff_serve.engine.weights import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

IDS = torch.randint(3, 131, (20,), generator=torch.Generator().manual_seed(3))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def eight(codes):
    """Codes [..., 8] as int32, the first in the lowest bits; bit by bit, in Python's integers."""
    flat = codes.reshape(-1, 8).tolist()
    words = [sum(c << (4 * i) for i, c in enumerate(row)) for row in flat]
    signed = [w - 2**32 if w >= 2**31 else w for w in words]
    return torch.tensor(signed, dtype=torch.int32).view(codes.shape[:-1])


class Layer:
    """A random layer of 4 bits: codes [n, k], scales and zeros [n, groups], and the group of each input."""

    def __init__(self, n, k, size, *, symmetric, shuffled, seed):
        generator = torch.Generator().manual_seed(seed)
        groups = k // size
        self.codes = torch.randint(0, 16, (n, k), generator=generator)
        self.scale = (torch.rand(n, groups, generator=generator) * 0.02 + 0.005).half()
        self.zero = torch.full((n, groups), 8)
        if not symmetric:
            self.zero = torch.randint(6, 10, (n, groups), generator=generator)
            self.zero[0, 0], self.zero[1, 0] = 0, 15  # both ends, where GPTQ's zeros wrap around
        self.index = torch.arange(k) // size
        if shuffled:
            self.index = self.index[torch.randperm(k, generator=generator)]

    @property
    def weight(self):
        return (self.codes - self.zero[:, self.index]) * self.scale.float()[:, self.index]

    def gptq(self, less):
        n, k = self.codes.shape
        zero = (self.zero - 1) % 16 if less else self.zero
        return {
            "qweight": eight(self.codes.t().reshape(k // 8, 8, n).permute(0, 2, 1)),
            "qzeros": eight(zero.t().reshape(-1, n // 8, 8)),
            "scales": self.scale.t().contiguous(),
            "g_idx": self.index.int(),
        }

    def awq(self):
        n, k = self.codes.shape
        order = list(AWQ_ORDER)
        return {
            "qweight": eight(self.codes.t().reshape(k, n // 8, 8)[..., order]),
            "qzeros": eight(self.zero.t().reshape(-1, n // 8, 8)[..., order]),
            "scales": self.scale.t().contiguous(),
        }

    def compressed(self, symmetric, shuffled):
        n, k = self.codes.shape
        out = {"weight_packed": eight(self.codes.view(n, k // 8, 8)), "weight_scale": self.scale}
        out["weight_shape"] = torch.tensor([n, k])
        if not symmetric:
            out["weight_zero_point"] = eight(self.zero.view(n // 8, 8, -1).permute(0, 2, 1))
        if shuffled:
            out["weight_g_idx"] = self.index.int()
        return out


CASES = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {}),
    "gptq symmetric": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {"symmetric": True}),
    "gptq one group": ({"quant_method": "gptq", "bits": 4, "group_size": -1}, {}),
    "gptq act order": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, {"shuffled": True}),
    "gptq v2": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, {}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, {}),
    "compressed-tensors": ({"symmetric": True, "strategy": "group", "group_size": 32}, {"symmetric": True}),
    "compressed-tensors zeros": ({"symmetric": False, "strategy": "group", "group_size": 32}, {}),
    "compressed-tensors rows": ({"symmetric": True, "strategy": "channel", "group_size": None}, {"symmetric": True}),
    "compressed-tensors order": (
        {"symmetric": True, "strategy": "group", "group_size": 32},
        {"symmetric": True, "shuffled": True},
    ),
}


def test_the_packing_is_that_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    layer = Layer(16, 64, 32, symmetric=False, shuffled=False, seed=1)
    parts = layer.compressed(False, False)
    assert torch.equal(parts["weight_packed"], helpers.pack_to_int32((layer.codes - 8).to(torch.int8), 4))
    zero = helpers.pack_to_int32((layer.zero - 8).to(torch.int8), 4, packed_dim=0)
    assert torch.equal(parts["weight_zero_point"], zero)


def config_of(entry):
    if "quant_method" in entry:
        return entry
    group = {"weights": {"num_bits": 4, "type": "int", **entry}, "input_activations": None, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


@pytest.fixture
def make(tiny_model, tmp_path):
    """``make(case, kind)`` gives a folder, and the model of transformers that it holds."""

    def build(case, kind="llama"):
        entry, options = CASES[case]
        folder = tmp_path / case.replace(" ", "-")
        shutil.copytree(tiny_model(kind), folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tensors = load_file(folder / "model.safetensors")
        for seed, name in enumerate(sorted(n for n in tensors if n.endswith("_proj.weight"))):
            n, k = tensors.pop(name).shape
            size = k if entry["group_size"] in (-1, None) else entry["group_size"]
            options_ = {"symmetric": False, "shuffled": False, **options}
            layer = Layer(n, k, size, seed=seed, **options_)
            method = case.split()[0]
            if method == "gptq":
                parts = layer.gptq(less=entry.get("checkpoint_format") != "gptq_v2")
            elif method == "awq":
                parts = layer.awq()
            else:
                parts = layer.compressed(**options_)
            base = name.removesuffix(".weight")
            tensors.update({f"{base}.{part}": value.contiguous() for part, value in parts.items()})
            model.get_submodule(base).weight.data.copy_(layer.weight)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": config_of(entry)}))
        return folder, model.eval()

    return build


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased"])
def test_folders_run_as_they_are(make, case, kind):
    folder, model = make(case, kind)
    decoder = Decoder(folder, num_pages=2)
    for number, layer in enumerate(decoder.layers):
        attention, mlp = model.model.layers[number].self_attn, model.model.layers[number].mlp
        parts = {
            layer.qkv: [attention.q_proj, attention.k_proj, attention.v_proj],
            layer.output: [attention.o_proj],
            layer.gate_up: [mlp.gate_proj, mlp.up_proj],
            layer.down: [mlp.down_proj],
        }
        for made, wanted in parts.items():
            pieces = made.layers if isinstance(made, Separate) else [made]
            assert all(isinstance(p, GroupLinear) for p in pieces)
            rows = []
            for piece in pieces:
                weight = piece.weight.dequantize()
                rows.append(weight if piece.order is None else weight[:, piece.order.argsort()])
            # A minimum is -scale * zero in float32, so a weight is off by a rounding of that at most.
            torch.testing.assert_close(torch.cat(rows), torch.cat([w.weight for w in wanted]), rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        truth = model(IDS[None]).logits[0]
    got = decoder.prefill(IDS, 0, torch.tensor([0]), all_logits=True)
    assert (got - truth).norm() < 0.05 * truth.norm()  # activations become int8


def test_stacked_where_no_layer_wants_an_order(make):
    assert isinstance(Decoder(make("awq")[0], num_pages=1).layers[0].qkv, GroupLinear)
    assert isinstance(Decoder(make("gptq act order")[0], num_pages=1).layers[0].qkv, Separate)


def test_groups_that_do_not_divide_a_layer_are_named(make):
    folder, _ = make("awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj \[64, 64\] does not consist of whole groups of 128 inputs"):
        Decoder(folder, num_pages=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq with 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 48}, "group_size=48"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "'gemv'"),
        (config_of({"symmetric": True, "strategy": "tensor"}), "strategy 'tensor'"),
    ],
)
def test_what_is_not_read_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        int4_settings(change)


def test_damaged_and_doubly_quantised_folders(make, tmp_path):
    folder, _ = make("gptq")
    with pytest.raises(ValueError, match=r"quantised already \(gptq\)"):
        Decoder(folder, quantize="int8", num_pages=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"][:2] = 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="g_idx does not give each group 32 inputs"):
        Decoder(folder, num_pages=1)
    del tensors["model.layers.0.mlp.down_proj.scales"], tensors["model.layers.0.mlp.up_proj.g_idx"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.scales"):
        Decoder(folder, num_pages=1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="3 bits"):
        DecoderConfig.from_folder(folder)

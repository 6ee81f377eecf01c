"""bitsandbytes both ways, with the real library."""

import json

import pytest
import torch
from eff_kernels import int8_quantize_rows
from eff_quant import (
    Int8Config,
    Int8Linear,
    convert_from_bnb_,
    load,
    load_bnb_int8,
    quantize_,
    save_bnb_int8,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

bnb = pytest.importorskip("bitsandbytes")


@given(
    rows=st.integers(1, 12),
    k=st.integers(1, 80),
    threshold=st.sampled_from([0.0, 1.0, 3.0, 6.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_codes_scales_and_columns_are_bit_equal(rows, k, threshold, seed):
    x = (torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 2.5).half()
    x[:, 0] = 0.25  # no row of outliers alone: bitsandbytes divides by its empty scale
    codes, absmax, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold)
    ours = int8_quantize_rows(x, threshold=threshold)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert ours.outlier_columns.tolist() == ([] if columns is None else columns.tolist())


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_product_is_within_a_step_of_float16(threshold):
    x, linear = (torch.randn(20, 96) * 3).half(), torch.nn.Linear(96, 40)
    int8 = Int8Linear.from_linear(linear, Int8Config(threshold=threshold, activation_group=None)).half()
    codes, absmax, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold)
    args = (x, codes, int8.codes, absmax, int8.SCB, columns, int8.bias)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(*args)
    # theirs rounds twice (int8 part, then the sum with the outlier part), each to float16 at the size of the result
    scale = theirs.abs().max().float()
    assert ((int8(x).float() - theirs.float()).abs() <= 2 * 2**-11 * scale).all()


@pytest.fixture
def bnb_folder(llama, tmp_path):
    """A checkpoint that transformers quantised and wrote with bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(torch.bfloat16).save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "bnb")
    return tmp_path / "bnb"


def int8_state(model):
    return {
        k: v for k, v in model.state_dict().items() if k.endswith((".SCB", ".weight_format")) or v.dtype == torch.int8
    }


def same_bytes(a, b):
    assert a.keys() == b.keys()
    assert len(a) == 3 * 14
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_their_checkpoint_loads_here_with_the_same_bytes(bnb_folder, ids):
    from transformers import AutoModelForCausalLM

    ours = load_bnb_int8(bnb_folder)
    theirs = AutoModelForCausalLM.from_pretrained(bnb_folder)
    same_bytes(int8_state(ours), int8_state(theirs))
    layer = ours.model.layers[0].mlp.down_proj
    assert isinstance(layer, Int8Linear)
    assert layer.config.threshold == 4.5
    assert layer.config.activation_group is None
    assert type(ours.lm_head) is torch.nn.Linear
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    y, expected = ours(ids).logits, theirs(ids).logits
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert torch.equal(load(bnb_folder)(ids).logits, y)


def test_we_quantise_to_their_bytes(bnb_folder, llama):
    model = llama(torch.bfloat16)
    quantize_(model, Int8Config())
    same_bytes(int8_state(model), int8_state(load_bnb_int8(bnb_folder)))


@pytest.mark.parametrize("skip", [("lm_head",), ("lm_head", "down_proj", "re:.*layers.1.self_attn.*")])
def test_our_checkpoint_loads_there_with_the_same_bytes(llama, ids, tmp_path, skip):
    from transformers import AutoModelForCausalLM

    ours = llama(torch.bfloat16)
    quantize_(ours, Int8Config(threshold=5.0, activation_group=None, skip=skip))
    save_bnb_int8(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = {name for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}
    assert kinds == {name for name, m in ours.named_modules() if isinstance(m, Int8Linear)}
    state = int8_state(theirs)
    assert all(torch.equal(v, state[k]) for k, v in int8_state(ours).items())
    assert theirs.model.layers[0].self_attn.q_proj.state.threshold == 5.0
    y, expected = theirs(ids).logits, ours(ids).logits
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    assert torch.equal(load_bnb_int8(tmp_path)(ids).logits, expected)


def test_saving_for_them_leaves_our_own_settings_in_place(llama, tmp_path, ids):
    model = llama()
    quantize_(model, Int8Config(threshold=5.0, activation_group=None))
    save_bnb_int8(model, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["threshold"] == 5.0
    assert torch.equal(load(tmp_path / "ours")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "none"},
        {"activation_group": 128},
        {"per_token_outliers": True},
        {"outlier_weights": "original", "outlier_columns": {"model.layers.0.mlp.down_proj": (1,)}},
    ],
)
def test_settings_that_they_lack_are_refused(llama, tmp_path, settings):
    model = llama()
    quantize_(model, Int8Config(**{"activation_group": None, **settings}))
    with pytest.raises(ValueError, match=f"bitsandbytes has no {next(iter(settings))}="):
        save_bnb_int8(model, tmp_path)


def test_a_loaded_model_is_converted_in_place(bnb_folder, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bnb_folder)
    expected = model(ids).logits  # after a forward pass their bytes are in another attribute
    state = {k: v.clone() for k, v in int8_state(model).items()}
    report = convert_from_bnb_(model)
    assert len(report.changed) == 14
    assert model.model.layers[0].mlp.down_proj.config == Int8Config(threshold=4.5, activation_group=None)
    same_bytes(state, int8_state(model))
    y = model(ids).logits
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours")(ids).logits, y)


def test_their_layers_with_16_bit_weights_are_left():
    model = torch.nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    report = convert_from_bnb_(model)
    assert report.changed == []
    assert "not int8 yet" in report.skipped[0].reason


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def test_a_file_without_layout_is_row_major(bnb_folder, ids):
    expected = load_bnb_int8(bnb_folder)(ids).logits

    def change(state):
        for name in [n for n in state if n.endswith("weight_format")]:
            del state[name]

    rewrite(bnb_folder, change)
    model, info = load_bnb_int8(bnb_folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model(ids).logits, expected)
    assert model.model.layers[0].mlp.up_proj.weight_format == 0


def test_a_tiled_layout_and_missing_scales_are_errors(bnb_folder):
    name = "model.layers.1.mlp.up_proj"
    rewrite(bnb_folder, lambda state: state[f"{name}.weight_format"].fill_(2))
    with pytest.raises(ValueError, match=f"{name}: weight_format=2"):
        load_bnb_int8(bnb_folder)

    def change(state):
        state[f"{name}.weight_format"].fill_(0)
        del state[f"{name}.SCB"]

    rewrite(bnb_folder, change)
    with pytest.raises(KeyError, match=f"{name}: int8 weight without its scales"):
        load_bnb_int8(bnb_folder)


def test_other_folders_are_refused(llama, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config is absent, not one of bitsandbytes int8"):
        load_bnb_int8(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load_bnb_int8(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="takes a transformers model"):
        save_bnb_int8(torch.nn.Linear(2, 2), tmp_path)

"""One way in for every folder: who wrote it is found in its config.json."""

from functools import partial

import pytest
import torch
from eff_quant import FP4Config, FP8Config, Int8Config, load, quantize_, save_bnb_int8
from eff_quant.fp4 import calibrate_fp4, save_fp4_checkpoint
from eff_quant.fp8_qat import save_compressed_fp8

NVFP4, MXFP4 = FP4Config(format="nvfp4"), FP4Config(format="mxfp4")


@pytest.mark.parametrize(
    ("config", "save"),
    [
        (Int8Config(activation_group=None), save_bnb_int8),
        (NVFP4, save_fp4_checkpoint),
        (MXFP4, save_fp4_checkpoint),
        (FP4Config(format="nvfp4", activations="static"), partial(save_fp4_checkpoint, layout="modelopt")),
        (FP8Config(), save_compressed_fp8),
        (FP8Config(activations="dynamic"), save_compressed_fp8),
    ],
    ids=["bitsandbytes", "nvfp4", "mxfp4", "modelopt", "fp8", "fp8-dynamic"],
)
def test_folders_of_other_libraries(llama, ids, tmp_path, config, save):
    model = llama(torch.bfloat16)
    quantize_(model, config)
    if isinstance(config, FP4Config) and config.activations == "static":
        calibrate_fp4(model, [{"input_ids": ids}]).set_input_scales(model)
    save(model, tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    assert type(again.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_config_beside_a_quantised_folder_is_refused(llama, tmp_path):
    model = llama(torch.bfloat16)
    quantize_(model, NVFP4)
    save_fp4_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="quantised already"):
        load(tmp_path, Int8Config())

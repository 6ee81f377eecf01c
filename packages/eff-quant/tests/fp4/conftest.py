"""A tiny Llama in FP4, with tensor scales far from 1 and an outlier among its weights."""

import pytest
import torch
from eff_quant import calibrate_fp4, quantize_


@pytest.fixture
def fp4_model(llama, ids):
    """A function that makes it, calibrated where its settings ask for that."""

    def make(config, dtype=torch.bfloat16):
        model = llama(dtype)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(30)
            model.model.layers[1].mlp.down_proj.weight[3, 5] = 2.0
        ranges = calibrate_fp4(model, [{"input_ids": ids}])
        quantize_(model, config)
        if config.activations == "static":
            ranges.set_input_scales(model)
        return model

    return make

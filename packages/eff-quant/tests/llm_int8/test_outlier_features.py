"""The demonstration: systematic outlier features ruin plain int8, and the decomposition brings the quality back.

Two entries of each RMSNorm's gain are multiplied by 40 and the matching columns of the linear layers behind it are
divided by 40. In exact arithmetic the model is unchanged, but its activations now look like those of a large language
model.
"""

import pytest
import torch
from eff_quant import Int8Config, outlier_report, quantize_

FEATURES = (11, 50)


def add_outlier_features(model):
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[list(FEATURES)] *= 40
                for linear in linears:
                    linear.weight[:, list(FEATURES)] /= 40


@pytest.fixture
def error(llama, ids):
    """A function: relative error of the logits under a config, with outlier features or without."""
    exact = llama().double()(ids).logits

    def measure(config, outliers=True):
        model = llama()
        if outliers:
            add_outlier_features(model)
            torch.testing.assert_close(model(ids).logits.double(), exact, rtol=1e-3, atol=1e-5)
        quantize_(model, config)
        return ((model(ids).logits - exact).norm() / exact.norm()).item()

    return measure


@pytest.mark.parametrize("settings", [{}, {"per_token_outliers": True}], ids=["columns", "per token"])
def test_plain_int8_breaks_and_the_decomposition_removes_the_error_of_the_activations(error, settings):
    plain = error(Int8Config(threshold=0.0))
    assert plain > 5 * error(Int8Config(threshold=0.0), outliers=False)
    decomposed = error(Int8Config(threshold=6.0, **settings))
    # What is left is the error of the stored weights: columns divided by 40 are coarse in a row's int8 scale.
    assert decomposed < 1.15 * error(Int8Config(activation="none"))
    assert decomposed < 0.5 * plain


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_original_weights_of_calibrated_columns_remove_the_rest(error, llama, ids, threshold):
    model = llama()
    add_outlier_features(model)
    columns = outlier_report(model, [{"input_ids": ids}]).static_columns(min_share=0.3)
    assert set(columns.values()) == {FEATURES}
    assert len(columns) == 2 * 5
    config = Int8Config(threshold=threshold, outlier_weights="original", outlier_columns=columns)
    assert error(config) < 1.1 * error(Int8Config(threshold=0.0), outliers=False)

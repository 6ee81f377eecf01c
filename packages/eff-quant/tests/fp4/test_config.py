import json

import pytest
import torch
from eff_quant import FP4Config
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"format": "fp4"}, ValueError, "format='fp4'; use one of 'nvfp4', 'mxfp4'"),
        ({"activations": "none"}, ValueError, "activations='none'; use one of 'dynamic', 'static', or None"),
        ({"scale_rounding": "nearest"}, ValueError, "scale_rounding='nearest'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"skip": "lm_head"}, TypeError, r"use a tuple, such as \('lm_head',\)"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype=torch.int8"),
        ({"out_dtype": "float17"}, TypeError, "out_dtype='float17'"),
        ({"scale_rounding": "even"}, ValueError, "scale_rounding='even' with format='nvfp4'"),
        ({"format": "mxfp4", "activations": "static"}, ValueError, "no tensor scale to calibrate; use 'dynamic'"),
        ({"fuse_groups": ("q_proj", "k_proj")}, TypeError, "one string"),
        ({"fuse_groups": (("q_proj",),)}, ValueError, "two names or more"),
        ({"fuse_groups": (("a", "b"), ("b", "c"))}, ValueError, "a name is in one group only"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value_seen(values, error, says):
    with pytest.raises(error, match=says):
        FP4Config(**values)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        FP4Config().format = "mxfp4"


@given(
    st.builds(
        FP4Config,
        format=st.just("mxfp4"),
        activations=st.sampled_from([None, "dynamic"]),
        scale_rounding=st.sampled_from(["floor", "even", "rceil", "ceil"]),
        skip=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    )
    | st.builds(
        FP4Config,
        activations=st.sampled_from([None, "dynamic", "static"]),
        fuse_groups=st.sampled_from([(), (("a", "b"),), (("a", "b", "c"), ("d", "e"))]),
        out_dtype=st.sampled_from([None, torch.bfloat16, torch.float32]),
        backend=st.sampled_from(["auto", "cpu", "reference"]),
    )
)
def test_it_survives_json(config):
    assert FP4Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"fmt": "mxfp4"}, r"has no \['fmt'\]"),
    ],
)
def test_settings_of_others_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        FP4Config.from_dict({**FP4Config().to_dict(), **change})


def test_the_block_belongs_to_the_format():
    assert FP4Config(format="nvfp4").block == 16
    assert FP4Config(format="mxfp4").block == 32

import json

import pytest
import torch
from eff_quant import Int8Config
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"threshold": -1.0}, ValueError, "threshold=-1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold=nan"),
        ({"threshold": "6"}, TypeError, "threshold='6'"),
        ({"threshold": True}, TypeError, "threshold=True"),
        ({"skip": "lm_head"}, TypeError, r"use a tuple, such as \('lm_head',\)"),
        ({"activation": "static"}, ValueError, "activation='static'; use one of 'dynamic', 'none'"),
        ({"outlier_weights": "fp16"}, ValueError, "outlier_weights='fp16'"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype=torch.int8"),
        ({"out_dtype": "float17"}, TypeError, "out_dtype='float17'"),
        ({"outlier_weights": "original"}, ValueError, "needs outlier_columns"),
        ({"outlier_columns": {"a": (1,)}}, ValueError, "'int8' takes none"),
        ({"outlier_weights": "original", "outlier_columns": {"a": (3, 1)}}, ValueError, "rising column numbers"),
        ({"outlier_weights": "original", "outlier_columns": {"a": ()}}, ValueError, "at least one"),
        ({"activation_group": 100}, ValueError, "activation_group=100; use a positive multiple of 32"),
        ({"activation_group": 0}, ValueError, "activation_group=0"),
        ({"activation_group": "128"}, TypeError, "activation_group='128'"),
        ({"activation": "none", "per_token_outliers": True}, ValueError, "no outliers to treat"),
        ({"per_token_outliers": True, "threshold": 0}, ValueError, "needs a threshold above 0"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value_seen(values, error, says):
    with pytest.raises(error, match=says):
        Int8Config(**values)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Int8Config().threshold = 3.0


@given(
    st.builds(
        Int8Config,
        threshold=st.floats(0.5, 100),
        skip=st.lists(st.text(min_size=1), max_size=3).map(tuple),
        per_token_outliers=st.booleans(),
        activation_group=st.sampled_from([None, 32, 128]),
        out_dtype=st.sampled_from([None, torch.bfloat16, torch.float32]),
        backend=st.sampled_from(["auto", "cpu", "reference"]),
    )
    | st.builds(
        Int8Config,
        outlier_weights=st.just("original"),
        outlier_columns=st.dictionaries(
            st.text(min_size=1), st.sets(st.integers(0, 99), min_size=1).map(lambda s: tuple(sorted(s))), min_size=1
        ),
    )
)
def test_it_survives_json(config):
    assert Int8Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"treshold": 6.0}, r"has no \['treshold'\]"),
    ],
)
def test_settings_of_others_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Int8Config.from_dict({**Int8Config().to_dict(), **change})


def test_settings_from_before_groups_keep_one_scale_for_a_row():
    values = Int8Config(threshold=5.0).to_dict()
    old = {**values, "version": 1}
    del old["activation_group"]
    assert Int8Config.from_dict(old) == Int8Config(threshold=5.0, activation_group=None)
    assert Int8Config.from_dict(values).activation_group == 128

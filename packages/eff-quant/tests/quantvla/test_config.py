import json

import pytest
import torch
from eff_quant.quantvla import ScaleMatchConfig, W4A8Config
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"weight_bits": 3}, ValueError, "weight_bits=3; use one of 4, 8"),
        ({"activation": "static"}, ValueError, "activation='static'"),
        ({"reduce": "first"}, ValueError, "reduce='first'; use one of 'max', 'mean'"),
        ({"rotation": "random"}, ValueError, "rotation='random'; use one of 'svd', 'hadamard', or None"),
        ({"act_percentile": 101}, ValueError, "act_percentile=101"),
        ({"act_percentile": "99"}, TypeError, "act_percentile='99'"),
        ({"permute_blend": float("nan")}, ValueError, "permute_blend=nan"),
        ({"block": 1}, ValueError, "block=1"),
        ({"block": 48, "rotation": "hadamard"}, ValueError, "block=48 with rotation='hadamard'"),
        ({"rotation": None, "permute": True}, ValueError, "do nothing without rotation"),
        ({"candidates": ()}, ValueError, "use one or more divisors above 0"),
        ({"candidates": (1.0, 0.0)}, ValueError, "use one or more divisors above 0"),
        ({"skip": "lm_head"}, TypeError, r"use a tuple, such as \('lm_head',\)"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype=torch.int8"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ],
)
def test_a_wrong_value_is_refused_with_the_value_seen(values, error, says):
    with pytest.raises(error, match=says):
        W4A8Config(**values)


@given(
    st.builds(
        W4A8Config,
        weight_bits=st.sampled_from([4, 8]),
        activation=st.sampled_from(["dynamic_token", "static_folded"]),
        rotation=st.sampled_from(["svd", "hadamard"]),
        row_rotation=st.booleans(),
        permute=st.booleans(),
        candidates=st.lists(st.floats(0.1, 2), min_size=1, max_size=3).map(tuple),
        skip=st.lists(st.text(min_size=1), max_size=3).map(tuple),
        out_dtype=st.sampled_from([None, torch.bfloat16]),
    )
)
def test_it_survives_json(config):
    assert W4A8Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 99}, "version 99"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"rotations": "svd"}, r"has no \['rotations'\]"),
    ],
)
def test_settings_of_others_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        W4A8Config.from_dict({**W4A8Config().to_dict(), **change})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha_clip": (1.1, 1.4)}, r"alpha_clip=\(1.1, 1.4\)"),
        ({"alpha_neutral": -0.1}, "alpha_neutral=-0.1"),
        ({"alpha_distance": "ratio"}, "alpha_distance='ratio'"),
        ({"std": "both"}, "std='both'"),
    ],
)
def test_limits_out_of_range_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        ScaleMatchConfig(**values)

"""The engine's settings check themselves and travel as JSON."""

import json
from pathlib import Path

import pytest
from eff_serve.engine_config import EngineConfig
from eff_serve.names import model_name

FULL = EngineConfig(
    model="folder",
    quantize="nvfp4",
    max_model_len=100,
    layer_reuse=Path("policy.json"),
    reuse_top_k=64,
    adapters={"polite": Path("adapters/polite")},
    lookup=8,
)


@pytest.mark.parametrize("config", [EngineConfig(), FULL])
def test_settings_come_back_from_json(config):
    assert EngineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantize": "int3"}, "quantize must be one of auto, int8, .*got 'int3'"),
        ({"threshold": float("nan")}, "threshold must be 0 or more, got nan"),
        ({"max_batch": 0}, "max_batch must be 1 or more, got 0"),
        ({"chunk": 0}, "chunk must be 1 or more, got 0"),
        ({"max_model_len": 0}, "max_model_len must be 1 or more, got 0"),
        ({"kv_gib": 0.0}, "kv_gib must be above 0, got 0.0"),
        ({"lookup": -1}, "lookup must be 0 or more, got -1"),
        ({"reuse_min_len": 5}, "need a policy in layer_reuse"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)


def test_json_of_another_version_or_with_more_in_it_is_refused():
    with pytest.raises(ValueError, match="of version 2"):
        EngineConfig.from_dict({"version": 2})
    with pytest.raises(ValueError, match="has no kv_gb"):
        EngineConfig.from_dict({"kv_gb": 1})


def test_names_of_models(tmp_path):
    assert model_name(None) == "SmolLM2-135M-Instruct"
    assert model_name(f"{tmp_path}/") == tmp_path.name
    assert model_name("files/Qwen3-0.6B-Q8_0.gguf") == "Qwen3-0.6B-Q8_0"
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"

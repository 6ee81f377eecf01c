"""A model with one head that was made to do harm: calibration helps it, and the search finds the head."""

import math

import numpy as np
import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, HeadSelection, apply_act, search_heads
from eff_attention.sink_calibration.search import paired_gain

BOS, DELIMITER, ASK, YES, NO, FILL = range(1, 7)
HARMFUL = (1, 1)
CONFIG = ACTConfig(layers=(0, 1), threshold=("absolute", 0.5))


@pytest.fixture
def planted():
    """Head 0 of layer 1 reads YES or NO; head 1 gives 60 % of its weight to the delimiter, which says NO."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=4, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        pad_token_id=0, bos_token_id=None, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    answer = 31  # the channel of the answer
    weight = {  # of each token before the softmax is normalised, by head
        0: {BOS: 1.0, DELIMITER: 0.1, ASK: 0.1, YES: 20.0, NO: 20.0, FILL: 0.1},
        1: {BOS: 2.0, DELIMITER: 6.0, ASK: 0.01, YES: 1.8, NO: 1.8, FILL: 0.1},
    }
    value = {0: {YES: 0.33, NO: -0.33}, 1: {YES: 1.0, NO: -1.0, DELIMITER: -1.0}}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for t in range(8):
            model.model.embed_tokens.weight[t, t] = 1.0
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1 / math.sqrt(32))  # a token is then a unit vector after the norm
        model.model.norm.weight.fill_(1.0)
        attention = model.model.layers[1].self_attn
        for head in weight:
            slow = 8 * head + 3  # a channel that rotary embedding leaves alone
            attention.q_proj.bias[slow] = 1.0
            for t, w in weight[head].items():
                attention.k_proj.weight[slow, t] = math.log(w) * math.sqrt(8)
            for t, v in value[head].items():
                attention.v_proj.weight[8 * head, t] = v
            attention.o_proj.weight[answer, 8 * head] = 1.0
        model.lm_head.weight[YES, answer], model.lm_head.weight[NO, answer] = 1.0, -1.0
    return model


LINES = torch.tensor(
    [[BOS, *[FILL] * before, word, *[FILL] * (2 - before), DELIMITER, ASK] for before in range(3) for word in (YES, NO)]
)
WANTED = torch.tensor([YES, NO] * 3)


@torch.no_grad()
def evaluate(model):
    last = model(input_ids=LINES, use_cache=False).logits[:, -1]
    right = ((last[:, YES] > last[:, NO]) == (WANTED == YES)).double().tolist()
    return {"early": right[:2], "late": right[2:]}


def test_the_harmful_head_is_ranked_first_and_calibrating_it_helps(planted):
    assert evaluate(planted) == {"early": [0, 1], "late": [0, 1, 0, 1]}
    found = search_heads(planted, evaluate, CONFIG)
    assert len(found.trials) == 8
    best = found.ranked[0]
    assert (best.layer, best.head) == HARMFUL
    assert best.gain == 0.5
    assert all(t.gain <= 0 for t in found.ranked[1:])
    assert found.heads == {1: (1,)}
    with apply_act(planted, found.config):
        assert evaluate(planted) == {"early": [1, 1], "late": [1, 1, 1, 1]}
    assert evaluate(planted) == {"early": [0, 1], "late": [0, 1, 0, 1]}


def test_coarse_to_fine_tries_the_heads_with_the_heaviest_sinks(planted):
    found = search_heads(planted, evaluate, CONFIG, max_evals=2)
    assert len(found.candidates) == 2
    assert HARMFUL in found.candidates
    assert found.heads == {1: (1,)}


def test_a_search_goes_on_where_it_was_broken_off(planted, tmp_path):
    path, calls = tmp_path / "search.json", []

    def broken(model):
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        search_heads(planted, broken, CONFIG, path=path)
    assert len(HeadSelection.load(path).trials) == 3
    assert evaluate(planted)["early"] == [0, 1]
    found = search_heads(planted, broken, CONFIG, path=path)
    assert len(calls) == 5 + 5
    assert found == search_heads(planted, evaluate, CONFIG)
    assert HeadSelection.load(path) == found
    seen = []
    fewer = search_heads(planted, broken, CONFIG, path=path, min_gain=0.6, progress=lambda *at: seen.append(at))
    assert (fewer.heads, seen, len(calls)) == ({}, [], 10)
    with pytest.raises(ValueError, match="other settings"):
        search_heads(planted, evaluate, ACTConfig(layers=(1,)), path=path)
    with torch.no_grad():
        planted.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="of model"):
        search_heads(planted, evaluate, CONFIG, path=path)
    assert len(search_heads(planted, evaluate, CONFIG, path=path, resume=False).trials) == 8


def test_limits_of_what_is_chosen(planted):
    found = search_heads(planted, evaluate, CONFIG, min_gain=-1.0, max_heads=2)
    assert sum(len(h) for h in found.heads.values()) == 2
    with pytest.raises(ValueError, match="max_heads=0"):
        search_heads(planted, evaluate, CONFIG, max_heads=0)
    with pytest.raises(ValueError, match="by data set"):
        search_heads(planted, lambda m: {}, CONFIG)
    with pytest.raises(ValueError, match="not finite"):
        search_heads(planted, lambda m: {"a": [float("nan")]}, CONFIG)
    sizes = iter([2, 3])
    with pytest.raises(ValueError, match="without calibration"):
        search_heads(planted, lambda m: {"a": [1.0] * next(sizes)}, CONFIG)


def test_intervals_of_gains():
    random = np.random.default_rng(1)
    before = {"a": (random.random(400) < 0.5).tolist(), "b": (random.random(100) < 0.5).tolist()}
    assert paired_gain(before, before) == (0.0, 0.0, 0.0, 1.0)
    after = {**before, "a": [1.0] * 400}
    change = np.asarray(after["a"], float) - np.asarray(before["a"], float)
    gain, low, high, p = paired_gain(before, after)
    assert gain == pytest.approx(change.mean() / 2)
    error = change.std() / math.sqrt(400) / 2
    assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert p < 0.01

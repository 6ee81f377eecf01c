"""Grammars on the real model: what it may write, in a batch with others, and at the edges of other settings."""

import json

import llguidance
import pytest
import torch
from eff_serve.api.grammar import JSON_STYLE
from eff_serve.engine import EngineConfig, load_engine
from eff_serve.engine.decoder import PAGE
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.grammar import GrammarMatcher
from eff_serve.engine.types import Sampling

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}


def regex(pattern):
    return llguidance.LLMatcher.grammar_from_regex(pattern)


@pytest.fixture(scope="module")
def loaded(smollm2):
    loaded = load_engine(EngineConfig(model=str(smollm2), max_model_len=8 * PAGE, kv_gib=0.1), progress=False)
    loaded.engine.start()
    yield loaded
    loaded.engine.stop(0)


@pytest.fixture
def write(loaded, ask):
    """``write(*(prompt, fields))``: texts and finish reasons of requests that run together."""

    def run(*requests):
        wanted = [(loaded.tokenizer.encode(prompt), {"max_tokens": 60, **fields}) for prompt, fields in requests]
        results = []
        for steps in ask(loaded.engine, wanted):
            ids = [s.token for s in steps if s.token is not None]
            results.append((loaded.tokenizer.decode(ids, True), steps[-1].finish_reason))
        return results

    return run


def test_each_request_follows_its_own_grammar(write):
    # Without the style, blanks are allowed between any two tokens, and a text of blanks never ends.
    schema = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides=JSON_STYLE)
    free = ("The capital of France is", {"max_tokens": 8, "temperature": 0})
    alone = write(free)
    (as_json, reason), (number, _), beside = write(
        ("A city as JSON:", {"grammar": schema, "temperature": 0}),
        ("Ten digits:", {"grammar": regex("[0-9]{10}")}),
        free,
    )
    assert reason == "stop"
    found = json.loads(as_json)
    assert set(found) == {"city", "size"}
    assert 0 <= found["size"] <= 99
    assert len(number) == 10
    assert number.isdigit()
    assert [beside] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_at_its_end_goes_before_min_tokens(write, temperature):
    fields = {"grammar": regex("yes|no"), "min_tokens": 20, "temperature": temperature, "seed": 1}
    assert write(("Is the sky blue?", fields))[0] in [("yes", "stop"), ("no", "stop")]


def test_mask_admits_exactly_the_tokens_that_fit(smollm2, smollm2_tokenizer):
    vocab = smollm2_tokenizer.vocab_size
    allowed = GrammarMatcher(regex("[ab]{3}"), smollm2 / "tokenizer.json", vocab, 2).allowed()
    texts = [smollm2_tokenizer.decode([i]) for i in allowed.nonzero().flatten().tolist()]
    assert {"a", "b", "ab"} <= set(texts)
    assert all(1 <= len(t) <= 3 and set(t) <= {"a", "b"} for t in texts)


def test_an_invalid_grammar_is_refused_before_it_costs_anything(loaded):
    with pytest.raises(ValueError, match="invalid grammar"):
        loaded.engine.submit([1], Sampling(max_tokens=1, grammar="start: ("))
    assert loaded.engine.stats().waiting == 0


def test_an_error_while_choosing_ends_one_sequence_of_the_batch(hash_decoder, make_engine, ask, monkeypatch):
    engine = make_engine(hash_decoder(16), max_model_len=4 * PAGE)
    whole = BatchEngine._advance

    def advance(self, sequence, logits: torch.Tensor, best):
        if sequence.prompt == [7] and len(sequence.output) == 3:
            raise RuntimeError("this one fails")
        whole(self, sequence, logits, best)

    monkeypatch.setattr(BatchEngine, "_advance", advance)
    good, bad = ask(
        engine, [([5], {"max_tokens": 9, "ignore_eos": True}), ([7], {"max_tokens": 9, "ignore_eos": True})]
    )
    assert [good[-1].finish_reason, bad[-1].finish_reason] == ["length", "error"]
    assert len([s for s in good if s.token is not None]) == 9
    assert "this one fails" in bad[-1].error
    assert engine.stats().kv_usage == 0


@pytest.mark.parametrize("pattern", [r"[^\s\S]", r"[0-9&&a]"])
def test_a_grammar_that_nothing_satisfies_is_refused(smollm2, pattern):
    grammar = regex(pattern)
    with pytest.raises(ValueError, match="no text satisfies"):
        GrammarMatcher(grammar, smollm2 / "tokenizer.json", 49152, 2)

"""Vectors of a real small decoder, over HTTP."""

import base64
import struct

import numpy as np
import pytest
import torch
from eff_serve.api import Settings, create_app
from eff_serve.engine.decoder import Decoder
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def decoder(tiny_model):
    return Decoder(tiny_model("llama"), num_pages=2)


@pytest.fixture
def embed(engine, tokenizer, decoder):
    engine.decoder, tokenizer.vocab_size = decoder, 131
    engine.max_model_len = decoder.config.max_model_len
    with TestClient(create_app(engine, tokenizer, Settings(model_id="fake")), raise_server_exceptions=False) as client:
        yield lambda path="/v1/embeddings", **fields: client.post(path, json=fields)


def vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.array([d["embedding"] for d in answer.json()["data"]])


def test_vectors_are_the_pooled_hidden_states_of_transformers(embed, tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    ids = [5, 9, 44, 7]
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state[0].double()
    for pooling, want in (("mean", states.mean(0)), ("last", states[-1])):
        (found,) = vectors(embed(input=ids, pooling=pooling))
        np.testing.assert_allclose(found, (want / want.norm()).numpy(), atol=2e-5)


def test_texts_of_a_batch_are_as_alone_and_counted(embed):
    answer = embed(input=["ab", "cde"], model="fake")
    both = vectors(answer)
    assert answer.json()["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert [d["index"] for d in answer.json()["data"]] == [0, 1]
    for text, vector in zip(["ab", "cde"], both, strict=True):
        np.testing.assert_array_equal(vectors(embed(input=text))[0], vector)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)


def test_base64_and_dimensions(embed):
    (plain,) = vectors(embed(input="ab"))
    text = embed(input="ab", encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(struct.unpack(f"<{len(plain)}f", base64.b64decode(text)), plain, atol=1e-7)
    (short,) = vectors(embed(input="ab", dimensions=8))
    np.testing.assert_allclose(short, plain[:8] / np.linalg.norm(plain[:8]), atol=1e-6)


def test_ollama(embed):
    answer = embed("/api/embed", model="fake", input=["ab", "c"]).json()
    assert answer["prompt_eval_count"] == 3
    np.testing.assert_allclose(answer["embeddings"][0], vectors(embed(input="ab"))[0], atol=1e-6)
    long = "a" * 400
    assert embed("/api/embed", model="fake", input=long).status_code == 200
    assert "limits are 1 and 256" in embed("/api/embed", model="fake", input=long, truncate=False).json()["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": "a" * 257}, "input[0]"),
        ({"input": [131]}, "input[0]"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "model": "other"}, "model"),
        ({"input": "a", "unknown": 1}, "unknown"),
    ],
)
def test_refused_by_name(embed, fields, param):
    answer = embed(**fields)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_a_model_that_gives_none_says_so(client):
    answer = client.post("/v1/embeddings", json={"input": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")

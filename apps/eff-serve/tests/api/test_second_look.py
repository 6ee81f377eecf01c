"""CARVE on the way through the API: what is asked three times, what is shown, what is remembered and what is refused.

The engine only records; what it says of each picture's attention is planted: the right half is what the question is
about.
"""

import base64
import io

import pytest
import torch
from eff_attention.contrastive_focus import CarveConfig
from eff_serve.api import Settings, create_app
from eff_serve.engine.types import QueueFullError
from PIL import Image
from starlette.testclient import TestClient

CONFIG = CarveConfig()


def data_url(colour="red", size=(20, 10)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class RecordingEyes:
    def __init__(self):
        self.seen = []

    def look(self, prompt, pictures):
        self.seen.append([picture.size for picture in pictures])
        return tuple(picture.size for picture in pictures)


@pytest.fixture
def eyes():
    return RecordingEyes()


@pytest.fixture
def seeing(engine, tokenizer, eyes):
    take = engine.submit

    def submit(prompt, sampling, pictures=None):
        if sampling.watch is not None:
            general = CONFIG.general.encode() in bytes(prompt)
            sampling.watch.begin((0,), torch.arange(4))
            one = torch.tensor([0.1, 0.1, 0.1, 0.1] if general else [0.1, 0.3, 0.1, 0.2])
            sampling.watch._seen = {0: [one] * 2}
        return take(prompt, sampling)

    engine.submit, engine.steering = submit, ("act", "carve")
    return TestClient(create_app(engine, tokenizer, Settings(model_id="fake"), eyes), raise_server_exceptions=False)


def ask(client, url=None, question="What is on the right?", before=(), path="/v1/chat/completions", **eff):
    parts = [{"type": "image_url", "image_url": {"url": url or data_url()}}, {"type": "text", "text": question}]
    messages = [*before, {"role": "user", "content": parts}]
    return client.post(path, json={"messages": messages, "max_tokens": 9, "eff": {"carve": eff or True}})


def asked(engine):
    return [(bytes(prompt).decode(), sampling) for prompt, sampling in engine.submitted]


def test_three_answers_and_the_last_is_told(seeing, engine, eyes):
    answer = ask(seeing)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    *both, (last, third) = asked(engine)
    (question, second), (general, first) = sorted(both, key=lambda pair: pair[0])
    assert general == f"user:{CONFIG.general}{CONFIG.suffix}|assistant:"
    assert question == last == f"user:What is on the right?{CONFIG.suffix}|assistant:"
    for recording in (first, second):
        assert recording.watch is not None
        assert (recording.temperature, recording.max_tokens) == (0.0, CONFIG.max_new_tokens)
    assert third.watch is None
    assert third.steering is None
    assert third.max_tokens == 9
    assert eyes.seen[-1][0] == (20, 10)
    # The best fifth of the pixels lies in the upper right corner.
    assert eyes.seen[-1][1] != (20, 10)
    assert len(eyes.seen[-1]) == 2
    assert answer.json()["usage"]["prompt_tokens"] == len(last)


def test_settings_are_those_of_the_request(seeing, engine, eyes):
    assert ask(seeing, final="refined", suffix=" Now.", general="Tell.", max_new_tokens=3).status_code == 200
    texts = [text for text, _ in asked(engine)]
    question = "user:What is on the right? Now.|assistant:"
    assert sorted(texts) == ["user:Tell. Now.|assistant:", question, question]
    assert texts[-1] == question
    assert len(eyes.seen[-1]) == 1


def test_the_general_request_of_a_picture_is_answered_once(seeing, engine):
    for question in ("What is on the right?", "And on the left?"):
        ask(seeing, question=question)
    assert sum(CONFIG.general in text for text, _ in asked(engine)) == 1
    assert len(engine.submitted) == 5
    ask(seeing, data_url("blue"))
    ask(seeing, max_new_tokens=7)
    ask(seeing, before=[{"role": "system", "content": "Be brief."}])
    assert sum(CONFIG.general in text for text, _ in asked(engine)) == 4


def test_an_earlier_turn_may_hold_the_picture(seeing, engine, eyes):
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "What is it?"},
    ]
    answer = seeing.post("/v1/chat/completions", json={"messages": turns, "max_tokens": 5, "eff": {"carve": True}})
    assert answer.status_code == 200
    assert asked(engine)[-1][0].endswith(f"|user:What is it?{CONFIG.suffix}|assistant:")
    assert len(eyes.seen[-1]) == 2


def test_a_full_line_is_told_and_the_next_request_answered(seeing, engine):
    engine.refusal = QueueFullError(3.0)
    assert ask(seeing).status_code == 429
    engine.refusal = ValueError("too long")
    assert ask(seeing).status_code == 400
    engine.refusal = None
    assert ask(seeing).status_code == 200


def test_what_cannot_be_looked_at_twice_is_refused(seeing, engine):
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    text = {"type": "text", "text": "What?"}
    for messages, param in [
        ([{"role": "user", "content": "What?"}], "eff.carve"),
        ([{"role": "user", "content": [image, image, text]}], "eff.carve"),
        ([{"role": "user", "content": [image]}], "messages"),
    ]:
        answer = seeing.post("/v1/chat/completions", json={"messages": messages, "eff": {"carve": True}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
    bad = ask(seeing, "data:image/png;base64,aGVsbG8=")
    assert bad.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    bare = seeing.post("/v1/completions", json={"prompt": "What?", "eff": {"carve": True}})
    assert bare.json()["error"]["param"] == "eff.carve"
    engine.steering = ("act",)
    assert "it supports 'act'" in ask(seeing).json()["error"]["message"]
    assert not engine.submitted


def test_responses_take_it_too(seeing, engine):
    image = {"type": "input_image", "image_url": data_url()}
    told = [{"role": "user", "content": [image, {"type": "input_text", "text": "What?"}]}]
    answer = seeing.post("/v1/responses", json={"input": told, "eff": {"carve": True}})
    assert answer.status_code == 200
    assert len(engine.submitted) == 3

"""The field ``eff``: what becomes of it on the way to the engine, what is refused, and what models tell."""

import pytest
from eff_attention.grounded_attention import PAINTConfig
from eff_attention.sink_calibration import ACTConfig
from eff_serve.engine.steering import Steering


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"act": True}, Steering(act=ACTConfig())),
        ({"act": {"beta": 0.2, "heads": {"3": [0, 1]}}}, Steering(act=ACTConfig(beta=0.2, heads={3: (0, 1)}))),
        ({"paint": {"alpha": 0.5}, "act": {}}, Steering(paint=PAINTConfig(alpha=0.5), act=ACTConfig())),
        ({"act": False, "var": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_steering_reaches_the_engine(chat, complete, engine, given, wanted):
    for post in (chat, complete):
        assert post(eff=given).status_code == 200
        assert engine.submitted[-1][1].steering == wanted


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"act": {"beta": 2}}, "eff.act", "beta=2.0; use 0 to 1"),
        ({"act": {"betta": 0.4}}, "eff.act", "betta"),
        ({"paint": True, "pai": True}, "eff", "give one of them"),
        ({"act": "yes"}, "eff.act", ""),
        ({"carve": True}, "eff.carve", "'carve' is not supported by this model; it supports no steering"),
        ({"carve": {"top_p": 0}}, "eff.carve", "top_p must be"),
        ({"carve": True, "act": True}, "eff", "leave out act"),
        ({"opera": True}, "eff.opera", ""),
    ],
)
def test_what_is_wrong_is_named(chat, engine, given, param, text):
    response = chat(eff=given)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert text in error["message"]
    assert not engine.submitted


def test_a_refusal_of_the_engine_is_400(chat, engine):
    engine.refusal = ValueError("steering by 'var' is not supported by this model; it supports 'act'")
    response = chat(eff={"var": True})
    assert response.status_code == 400
    assert "it supports 'act'" in response.json()["error"]["message"]


def test_models_tell_what_they_take(client, engine):
    assert client.get("/v1/models").json()["data"][0]["steering"] == []
    engine.steering = ("act", "pai")
    assert client.get("/v1/models").json()["data"][0]["steering"] == ["act", "pai"]

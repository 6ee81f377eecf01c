"""The small parts alone: data by number, learning rate, averages, random states, metrics, signals, curves."""

import dataclasses
import json
import math
import os
import random
import resource
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch
from eff_train.frame import TrainConfig, generator, shuffled, torch_generator
from eff_train.frame.curves import log_ticks, panel, thin, ticks
from eff_train.frame.data import to_device
from eff_train.frame.metrics import Board, Means, MetricsFile, read_metrics
from eff_train.frame.optimize import Average, learning_rate, swapped
from eff_train.frame.randomness import own_randomness, random_state, set_random_state
from eff_train.frame.stop import Stop
from torch import nn


def test_each_epoch_visits_each_place_once_in_its_own_order():
    places = shuffled(range(21), 7, 3)
    epochs = [places[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert shuffled(range(5, 12), 7, 3) == places[5:12]
    assert shuffled(range(7), 7, 4) != epochs[0]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        shuffled(range(1), 0, 0)


def test_random_numbers_of_a_sample():
    assert generator(1, 2).random() == generator(1, 2).random() != generator(2, 1).random()
    draws = [float(torch.rand((), generator=torch_generator(s, i))) for s, i in ((1, 2), (1, 2), (2, 1), (1, 3))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_to_device_keeps_the_kinds():
    pair = namedtuple("pair", "a b")
    point = dataclasses.make_dataclass("Point", ["x"])
    x = torch.zeros(2)
    batch = {"p": pair(x, "text"), "q": [x, (x, 1)], "r": point(x)}
    moved = to_device(batch, torch.device("meta"))
    assert type(moved["p"]) is pair
    assert moved["p"].b == "text"
    assert moved["q"][1][1] == 1
    assert all(t.device.type == "meta" for t in (moved["p"].a, moved["q"][0], moved["q"][1][0], moved["r"].x))


def test_learning_rate():
    c = TrainConfig(steps=11, warmup=4, lr=1.0, lr_end=0.1)
    rates = [learning_rate(i, c) for i in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.55)  # half way down
    assert rates[10] == pytest.approx(0.1)
    linear = dataclasses.replace(c, schedule="linear", lr_end=0.0)
    assert [learning_rate(i, linear) for i in (4, 7, 10)] == [1.0, 0.5, 0.0]
    assert learning_rate(9, dataclasses.replace(c, schedule="constant")) == 1.0
    assert math.isfinite(learning_rate(0, TrainConfig(steps=1)))


def test_average_against_its_formula():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    average, wanted = Average(layer, 0.5), layer.weight.detach().double()
    assert list(average.values) == ["weight"]
    for step in range(30):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 2, generator=torch.Generator().manual_seed(step)))
        average.update(layer, step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * layer.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), wanted, rtol=1e-5, atol=1e-6)
    held = layer.weight.detach().clone()
    with swapped(layer, average.values):
        assert torch.equal(layer.weight, average.values["weight"])
    assert torch.equal(layer.weight, held)


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_random_states_come_back(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "s.pt")
    first = draw()
    set_random_state(torch.load(tmp_path / "s.pt", weights_only=True))
    assert draw() == first
    set_random_state(state)
    with own_randomness(5):
        inside = draw()
    assert draw() == first
    with own_randomness(5):
        assert draw() == inside != first


def test_means_are_weighted_and_saved():
    means = Means()
    means.add({"loss": torch.tensor(1.0), "a": 2.0}, 1)
    means.add({"loss": torch.tensor(4.0)}, 2)
    copy = Means()
    copy.load_state_dict(means.state_dict(), torch.device("cpu"))
    assert copy.read() == means.read() == {"loss": 3.0, "a": 2.0}


def test_metrics_file_survives_a_cut_line_and_resumes(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsFile(path, pytest.fail)
    for step in (1, 2, 3):
        log.write({"step": step, "event": "train", "loss": float("nan") if step == 2 else 1.0})
    with path.open("a") as file:
        file.write('{"step": 4, "ev')
    again = MetricsFile(path, pytest.fail)
    again.write({"step": 3, "event": "stop"})
    again.write({"step": 2, "event": "resume"})
    again.write({"step": 3, "event": "train", "loss": 2.0})
    found = [(r["step"], r["event"]) for r in read_metrics(path)]
    assert found == [(1, "train"), (2, "train"), (3, "stop"), (2, "resume"), (3, "train")]
    assert read_metrics(path)[1]["loss"] == "nan"
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_metrics_wait_while_the_disk_is_full(tmp_path):
    path, said = tmp_path / "m.jsonl", []
    log = MetricsFile(path, said.append)
    log.write({"step": 1, "event": "train"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        log.write({"step": 2, "event": "train"})
        log.write({"step": 3, "event": "train"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1
    assert [r["step"] for r in read_metrics(path)] == [1]
    log.write({"step": 4, "event": "train"})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_tensorboard_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path)
    board.write(3, "train", {"loss": 0.5})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5)]


def test_first_signal_is_a_wish_and_the_second_acts():
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


def test_ticks():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(3, 3)[0] < 3 < ticks(3, 3)[-1]
    assert log_ticks(0.002, 30) == [0.001, 0.01, 0.1, 1.0, 10.0]


def test_panel_scales_and_skips_what_is_no_number():
    svg = panel({"train": [(0, 0.0), (10, 1.0), (5, math.nan)], "evaluation": [(10, 0.5)]}, "a<b")
    assert 'points="58.0,192.0 428.0,12.0"' in svg
    assert "nan" not in svg
    assert 'aria-label="a&lt;b"' in svg
    assert "update 10: 0.5" in svg
    assert panel({"train": [(0, math.inf)]}, "x") == ""
    log = panel({"train": [(0, 1e-4), (1, 1e-2), (2, 1.0)]}, "x")
    assert 'points="58.0,192.0 243.0,102.0 428.0,12.0"' in log


def test_thin_averages():
    assert list(thin([(i, float(i)) for i in range(10)], 5)) == [(1, 0.5), (3, 2.5), (5, 4.5), (7, 6.5), (9, 8.5)]

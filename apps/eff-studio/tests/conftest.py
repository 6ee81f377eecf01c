"""The embedded model once a session, and a fake one with all that serves it."""

import functools
import importlib.util
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

with warnings.catch_warnings():
    # transformers imports torchao where it is installed, whose docstrings do not compile without warnings
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("torchao"):
        import torchao  # noqa: F401
    import diffusers  # noqa: F401

FAKE = Path(__file__).parent / "fake_studio.py"
_spec = importlib.util.spec_from_file_location("eff_studio_fake", FAKE)
fake_studio = sys.modules["eff_studio_fake"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_studio)


@pytest.fixture(scope="session")
def collage():
    """The embedded model as the studio loads it."""
    from eff_studio.engine import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield load_model()
    torch.set_num_threads(threads)


@pytest.fixture
def fake():
    return fake_studio.fake_model()


@pytest.fixture
def make_worker(tmp_path):
    """``make_worker(model)`` is a started worker on the folder of this test; all are stopped at its end."""
    from eff_studio.engine import run_work
    from eff_studio.store import Jobs, Pictures
    from eff_studio.worker import Worker

    made = []

    def make(model, *, start=True):
        store = Jobs(tmp_path / "studio.db"), Pictures(tmp_path / "pictures")
        worker = Worker(model, *store, run=functools.partial(run_work, model))
        made.append(worker)
        if start:
            worker.start()
        return worker

    yield make
    for worker in made:
        if hasattr(worker.model.pipe, "gate"):
            worker.model.pipe.gate.set()
        if worker.alive:
            worker.stop()
        worker.jobs.close()


@pytest.fixture
def worker(make_worker, fake):
    return make_worker(fake)


@pytest.fixture
def png():
    """``png(width, height)`` is a PNG file of noise."""

    def make(width=8, height=8, mode="RGB", value=None):
        points = np.random.default_rng(0).integers(0, 255, (height, width, len(mode)), dtype=np.uint8)
        image = Image.fromarray(points.squeeze() if len(mode) == 1 else points, mode=None)
        if value is not None:
            image = Image.new(mode, (width, height), value)
        out = io.BytesIO()
        image.save(out, format="PNG")
        return out.getvalue()

    return make


@pytest.fixture
def settle():
    """``settle(what)`` waits until ``what()`` is true and returns it."""
    import time

    def wait(what, seconds=30.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.01)
        raise AssertionError("it did not come to be in time")

    return wait

"""A model that draws noise, for tests of all that is around models; as a program it serves it."""

import threading
import time
from types import SimpleNamespace

import numpy as np
from eff_studio.engine import StudioModel
from PIL import Image

SIDE = 64


class FakePipe:
    """Draws noise from the seed. ``gate`` holds it before each step; ``calls`` tells what it was asked for."""

    do_classifier_free_guidance = True
    device = "cpu"

    def __init__(self, seconds=0.0):
        self.gate, self.calls, self.seconds = threading.Event(), [], seconds
        self.gate.set()

    def __call__(self, prompt, *, num_inference_steps, generator, callback_on_step_end, **more):
        self.calls.append({"prompt": prompt, "steps": num_inference_steps, **more})
        if prompt == "boom":
            raise RuntimeError("a secret of the inside")
        for step in range(num_inference_steps):
            assert self.gate.wait(60)
            time.sleep(self.seconds)
            callback_on_step_end(self, step, 0, {})
        points = np.random.default_rng(generator.initial_seed()).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        return SimpleNamespace(images=[Image.fromarray(points)])


def fake_model(seconds=0.0):
    return StudioModel(
        name="noise", pipe=FakePipe(seconds), width=SIDE, height=SIDE, multiple=16, heads=(2, 2), resizable=False
    )


if __name__ == "__main__":
    import eff_studio.engine
    from eff_studio.cli import main

    eff_studio.engine.load_model = lambda *args, **settings: fake_model(0.05)
    main()

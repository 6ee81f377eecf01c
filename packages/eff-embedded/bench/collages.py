"""Times a collage of four sprites with its caption and masks, on one thread; appends to results/collages.jsonl.

``python packages/eff-embedded/bench/collages.py`` takes seconds. Each call draws another collage; sprites that were
drawn before at one size are kept, as in a training.
"""

from pathlib import Path

import numpy as np
import torch
from eff_embedded import collages
from eff_kernels.testing.records import Provider, Recorder

HERE = Path(__file__).parent
SOURCES = (HERE.parent / "src" / "eff_embedded" / "collages",)
CONFIG = collages.CollageConfig(objects=(4, 4))


def main():
    torch.set_num_threads(1)
    for seed in range(300):
        collages.sample(seed, CONFIG)

    def exact():
        made = [collages.sample(seed, CONFIG) for seed in range(20)]
        whole = all(np.array_equal(collages.composite(c.ground, c.layers), c.picture) for c in made)
        return whole and all(c.visible.sum(0).max() <= 1 for c in made)

    def everything(seed):
        collage = collages.sample(1000 + seed, CONFIG)
        return collage.picture, collage.caption(seed).text, collage.full, collage.visible

    recorder = Recorder("collages", HERE / "results" / "collages.jsonl", sources=SOURCES)
    ways = {
        "picture, caption, masks": everything,
        "and questions": lambda seed: (everything(seed), collages.sample(1000 + seed, CONFIG).questions()),
    }
    for mode, run in ways.items():
        recorder.run("128x128, 4 sprites", [Provider("eff", run, backend="numpy", check=exact)], mode=mode, rounds=200)
    print(recorder.table())


if __name__ == "__main__":
    main()
